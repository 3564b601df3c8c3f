"""Lossless stages before a coder."""
