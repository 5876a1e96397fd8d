"""How users name heads, positions and tokens."""
