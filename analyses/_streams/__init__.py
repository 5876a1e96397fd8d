"""The residual stream as a sum of what each part of the model wrote."""
