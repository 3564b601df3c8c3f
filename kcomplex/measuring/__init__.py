"""Weights times estimators: descriptions, their proof, and where the bits are."""
