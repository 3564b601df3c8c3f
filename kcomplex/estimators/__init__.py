"""What estimators are, how they are specified, and how stages stand in a row."""
