"""Trained models inside packages of PyPI: what there is, and how files come out, are held to digests and converted."""
