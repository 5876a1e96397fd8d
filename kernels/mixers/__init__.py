"""Exact maps of layers that mix positions without softmax attention: linear recurrences and convolutions."""
