"""Layers without softmax attention, read as maps that are held to what the layer gave."""
