"""The shortest of several codes for every tensor."""
