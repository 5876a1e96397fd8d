"""Intervals of a mean over texts, by drawing the texts again with replacement."""

from __future__ import annotations

import numpy as np

LEVEL = 0.95


def interval(values: np.ndarray, draws: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean over axis 0 [text, …], and the bounds between which 95 % of the means of redrawn texts lie.

    All columns are drawn together, so that differences between them stay paired. NaN entries are left out; fewer than
    two texts have no interval (NaN).
    """
    count = len(values)
    known = np.isfinite(values)
    mean = _mean(values, known)
    if count < 2:
        return mean, np.full_like(mean, np.nan), np.full_like(mean, np.nan)
    picks = np.random.default_rng(seed).integers(count, size=(draws, count))
    means = np.stack([_mean(values[pick], known[pick]) for pick in picks])
    tail = (1 - LEVEL) / 2
    empty = ~np.isfinite(means).any(0)
    low, high = np.nanquantile(np.where(empty, 0.0, means), [tail, 1 - tail], axis=0)
    return mean, np.where(empty, np.nan, low), np.where(empty, np.nan, high)


def _mean(values: np.ndarray, known: np.ndarray) -> np.ndarray:
    count = known.sum(0)
    total = np.where(known, values, 0.0).sum(0)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)
