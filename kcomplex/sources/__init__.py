"""Sources: a path, a state dict or a live module becomes weights."""
