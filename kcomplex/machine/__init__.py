"""What the computer does, and nothing of the subject: compiled loops, threads, memory, files."""
