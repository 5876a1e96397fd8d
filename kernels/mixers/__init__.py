"""Exact maps that are no softmax of one set of scores: recurrences, convolutions, products of maps, lists of keys."""
