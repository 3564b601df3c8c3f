"""Tracking: snapshots of a training run, measured beside it, in a store that survives being killed."""
