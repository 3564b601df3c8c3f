"""The tight codes: every binary decision by mixed predictions, around linear ones."""
