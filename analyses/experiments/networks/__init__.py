"""Small networks by specification string."""
