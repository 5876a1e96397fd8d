"""Numbers that are asked of a model's output, and their intervals."""
