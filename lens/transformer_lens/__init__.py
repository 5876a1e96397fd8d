"""The same model under the names of TransformerLens."""
