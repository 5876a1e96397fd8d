"""Facts of an opened model; nothing here runs it."""
