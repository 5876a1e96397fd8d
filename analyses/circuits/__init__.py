"""Which parts and edges of a model carry a behaviour."""
