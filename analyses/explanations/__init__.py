"""Tests of explanations: whether they show what a prediction rests on.

Question: Does an explanation show what is known to matter?
"""
