"""General-purpose codes of bytes."""
