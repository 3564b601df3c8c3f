"""Lossy codes as short as a wish allows: the search for the steps of quantisers."""
