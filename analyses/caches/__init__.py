"""Caches of keys and values that hold fewer keys: which are kept, and what is lost.

Question: Which keys does a model need to keep?
"""
