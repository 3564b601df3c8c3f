"""Experiments: data, network, mode and seed become a run."""
