"""The fast tight code: adaptive counts in bins of row and column scale."""
