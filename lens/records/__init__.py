"""What is kept of a run, in memory or in one file."""
