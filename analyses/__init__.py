"""The studies: experiments, and what is computed and drawn from their runs."""
