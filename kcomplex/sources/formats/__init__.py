"""Readers of checkpoint files: one a file, each lazy, found through the entry points ``kcomplex.formats``."""
