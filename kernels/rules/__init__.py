"""How products of queries and keys become weights: scale, bias, soft-cap, normaliser."""
