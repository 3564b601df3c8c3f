"""Zero-order entropy: each symbol by how often it occurs."""
