"""Training modes that quantise, and what a quantised network costs to run."""
