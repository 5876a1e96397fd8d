"""The attention function that transformers calls, and the context variables with what a caller has switched on."""
