"""The version of kcomplex; stored with every number it measures."""

VERSION = "0.1.0"
