"""Prompts one by one, in batches and in pairs."""
