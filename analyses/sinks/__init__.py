"""Analyses of attention sinks: where they are, what they carry, and what happens without them.

Question: Where does attention drain?
"""
