"""Which parts and edges of a model carry a behaviour.

Question: Which parts make the answer?
"""
