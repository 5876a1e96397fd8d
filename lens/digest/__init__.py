"""The digest of everything in a model that decides its numbers, and what makes asking for it cheap."""
