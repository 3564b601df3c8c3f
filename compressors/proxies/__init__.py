"""Numbers that bound nothing: proxies of complexity."""
