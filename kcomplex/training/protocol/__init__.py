"""What every training mode is, and what drives it."""
