"""Blocks of weights, the motifs chosen from them, and the nearest motif of each block."""
