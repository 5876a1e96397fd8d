"""Loops over maps that numba compiles for the processor at hand, where the extra `fast` is installed."""
