"""Attention maps that can be clicked, drawn in the browser on a canvas."""
