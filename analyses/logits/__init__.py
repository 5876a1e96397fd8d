"""What a head or a layer writes towards the vocabulary.

Question: What is written towards the vocabulary?
"""
