"""Input tokens as the vectors with which they enter a model, and blanks in their place."""
