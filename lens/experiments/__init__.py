"""A file that says what to run, and the file that says what came of it."""
