"""Analyses of heads: their patterns, weights and roles, and the loss without them or with trained changes.

Question: Which heads matter, and for what?
"""
