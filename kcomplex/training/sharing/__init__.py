"""Training modes whose weights share values, motifs or factors."""
