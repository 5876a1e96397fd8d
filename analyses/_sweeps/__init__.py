"""Sweeps: many prompts, layers, analyses, edits and seeds as one file, and the folder that keeps what came."""
