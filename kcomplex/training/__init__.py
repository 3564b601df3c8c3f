"""Training modes: what a method does to a model and its training loop; one method a file."""
