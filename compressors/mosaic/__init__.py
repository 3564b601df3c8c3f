"""Blocks of weights as indices into one codebook of motifs."""
