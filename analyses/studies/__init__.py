"""What is computed and drawn from runs: one study a file."""
