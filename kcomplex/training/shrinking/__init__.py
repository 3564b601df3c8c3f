"""Smaller layers with the same outputs: what has no influence is found and removed."""
