"""What a head or a layer writes towards the vocabulary."""
