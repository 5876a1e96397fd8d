"""The function that transformers calls for attention, and the context in which a caller is heard."""
