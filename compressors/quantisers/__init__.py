"""Lossy stages before a coder: levels, steps and signs."""
