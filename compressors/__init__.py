"""The built-in estimators: coders, transforms, quantisers and proxies, one family a file."""
