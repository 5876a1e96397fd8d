"""Which rows and columns of a map there are, and which keys each query may see."""
