"""Diffusion models of diffusers: parts `self`, `cross` and `joint`, steps of a sampling run, branches of guidance."""
