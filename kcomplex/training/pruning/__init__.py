"""Training modes that prune."""
