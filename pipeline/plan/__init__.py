"""What was decided for a run, and the memory that decides it."""
