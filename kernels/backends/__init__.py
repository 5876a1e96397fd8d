"""Ways to compute attention without the map; `choose` takes the first that can."""
