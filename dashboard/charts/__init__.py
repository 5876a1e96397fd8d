"""Figures of single pages: numbers in, plotly out."""
