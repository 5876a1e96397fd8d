"""Pictures and sounds from files and arrays, read within limits."""
