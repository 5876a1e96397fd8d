"""Corpus statistics written out from dense float64 maps, row by row and pair by pair, as their definitions read.

It shares no code with Headwater. A map is [head, query, key] of one text that stands alone.
"""

from __future__ import annotations

import math
from collections import defaultdict

import numpy as np

ROWS = (
    "weight", "entropy", "distance", "first", "self", "previous", "duplicate", "induction", "aside", "free_self",
    "free_previous", "free_duplicate", "free_induction",
)  # fmt: skip


def seen(maps: np.ndarray) -> np.ndarray:
    """Which pairs a mask leaves: weights of a softmax are never 0 elsewhere."""
    return (maps > 0).any(0)


def shares(w: np.ndarray, visible: np.ndarray) -> np.ndarray:
    """What each key receives from the queries that see it; NaN where fewer than a quarter of the most see it."""
    by = visible.sum(0)
    return np.array([w[:, k].sum() / by[k] if by[k] >= 0.25 * by.max() else math.nan for k in range(len(by))])


def rows(w: np.ndarray, ids: list[int], visible: np.ndarray) -> dict[str, list[tuple[float, int, int]]]:
    """(value, query, key) of every row in which a statistic is defined; a key of -1 is one that nobody asks about."""
    n = len(ids)
    share = shares(w, visible)
    sinks = [k for k in range(n) if share[k] > 0.3]
    found: dict[str, list[tuple[float, int, int]]] = defaultdict(list)
    for q in range(n):
        if visible[q].sum() < 2:
            continue
        copies = [k for k in range(q) if ids[k] == ids[q]]
        follow = [k + 1 for k in copies]
        off = [w[q, k] if k > 0 else -1 for k in range(n)]
        far = int(np.argmax(off))
        left = sum(w[q, k] for k in range(n) if k not in sinks)
        free = [0.0 if k in sinks else w[q, k] for k in range(n)]

        def put(name: str, value: float, key: int) -> None:
            found[name].append((float(value), q, key))  # noqa: B023

        put("entropy", -sum(x * math.log(x) for x in w[q] if x > 0), far)
        put("distance", sum(w[q, k] * abs(q - k) for k in range(n)), far)
        put("self", w[q, q], q)
        put("aside", sum(w[q, k] for k in sinks), far)
        if q > 0:
            put("weight", off[far], far)
            put("first", w[q, 0], 0)
            put("previous", w[q, q - 1], q - 1)
        if copies:
            put("duplicate", sum(w[q, k] for k in copies), max(copies, key=lambda k: (w[q, k], k)))
            put("induction", sum(w[q, k] for k in follow), max(follow, key=lambda k: (w[q, k], k)))
        if left > 1e-3:
            put("free_self", free[q] / left, q)
            if q > 0:
                put("free_previous", free[q - 1] / left, q - 1)
            if copies:
                put("free_duplicate", sum(free[k] for k in copies) / left, -1)
                put("free_induction", sum(free[k] for k in follow) / left, -1)
    for k in range(1, n):
        if not math.isnan(share[k]):
            found["received"].append((float(share[k]), int(np.argmax(w[:, k])), k))
    return found


def headvis(texts: list[tuple[list[int], np.ndarray]]) -> np.ndarray:
    """The six numbers of the public pipeline over texts (ids, [head, query, key]), [number, head]."""
    heads = texts[0][1].shape[0]
    sums, positions, before, repeats = np.zeros((6, heads)), 0, 0, 0
    for ids, maps in texts:
        n = len(ids)
        positions += n
        before += n - 1
        for q in range(n):
            sums[0] += maps[:, q, q]
            if q:
                sums[1] += maps[:, q, q - 1]
            for k in range(n):
                x = maps[:, q, k]
                sums[2] -= x * np.log(np.maximum(x, np.finfo(np.float32).tiny))
                sums[3] += x * abs(q - k)
                sums[4] += x * (q - k) ** 2
            earlier = [k for k in range(q) if ids[k] == ids[q]]
            repeats += bool(earlier)
            for k in earlier:
                x = maps[:, q, k + 1]
                sums[5] += np.where(x < 0.01, 0, x)
    mean = sums / np.array([positions, before, positions, positions, positions, max(repeats, 1)])[:, None]
    mean[4] -= mean[3] ** 2
    return mean if repeats else np.vstack([mean[:5], np.full((1, heads), np.nan)])
