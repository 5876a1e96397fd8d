"""Finds the analyses and their settings."""
