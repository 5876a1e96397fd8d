"""Analyses of pictures: what heads and patches write about them, and what happens without them.

Question: What do heads do with a picture?
"""
