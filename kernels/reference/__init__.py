"""The meaning of every rule and edit, dense and in float64."""
