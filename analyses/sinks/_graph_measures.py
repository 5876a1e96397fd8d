"""Measures of one attention map as a weighted graph: Laplacian spectrum, Betti numbers, Gini coefficient, entropy.

A map is not symmetric, so the graph is `W = (A + Aᵀ)/2` with an empty diagonal. The code is dense, for small maps:
eigenvalues cost n³ and the clique complex visits all triangles.
"""

from __future__ import annotations

import networkx as nx
import numpy as np


def symmetric(weights: np.ndarray) -> np.ndarray:
    """`W` of a square map [query, key]."""
    both = (weights + weights.T) / 2
    np.fill_diagonal(both, 0.0)
    return both


def laplacian_spectrum(graph: np.ndarray, normalised: bool) -> np.ndarray:
    """Eigenvalues of `D - W`, or of `I - D^-1/2 W D^-1/2`, ascending; a node without edges has a zero row."""
    degree = graph.sum(1)
    if not normalised:
        return np.linalg.eigvalsh(np.diag(degree) - graph)
    scale = np.where(degree > 0, 1 / np.sqrt(np.where(degree > 0, degree, 1.0)), 0.0)
    return np.linalg.eigvalsh(np.diag((degree > 0).astype(float)) - scale[:, None] * graph * scale)


def top_direction(graph: np.ndarray) -> np.ndarray:
    """Absolute values |v_1[j]| of the eigenvector of W with the largest eigenvalue."""
    return np.abs(np.linalg.eigh(graph)[1][:, -1])


def entropy(shares: np.ndarray) -> float:
    """`-Σ p ln p` of non-negative numbers divided by their sum, in nats; NaN if all are 0."""
    total = shares.sum()
    if total <= 0:
        return float("nan")
    shares = shares / total
    return float(-(shares * np.log(np.where(shares > 0, shares, 1.0))).sum())


def gini(values: np.ndarray) -> float:
    """Gini coefficient of non-negative numbers: 0 if all are equal, (n-1)/n if one has everything; NaN if all are 0."""
    total, count = values.sum(), len(values)
    if total <= 0:
        return float("nan")
    rank = np.arange(1, count + 1)
    return float((2 * rank - count - 1) @ np.sort(values) / (count * total))


def betti(graph: np.ndarray, threshold: float) -> tuple[int, int, int]:
    """β0 and β1 of the graph of edges `W ≥ threshold`, and β1 of its clique complex (triangles filled), over GF(2).

    β1 of the complex is `dim ker d1 - rank d2`; `dim ker d1` is β1 of the graph, `E - V + β0`.
    """
    drawn = nx.from_numpy_array(np.triu(graph, 1) >= max(threshold, np.finfo(float).tiny))
    components = nx.number_connected_components(drawn)
    cycles = drawn.number_of_edges() - drawn.number_of_nodes() + components
    return components, cycles, cycles - _triangle_rank(drawn, cycles)


def _triangle_rank(drawn: nx.Graph, most: int) -> int:
    """Rank of d2, whose columns are the edges of each triangle; at most `most`, the number of cycles."""
    number = {frozenset(edge): 1 << i for i, edge in enumerate(drawn.edges)}
    pivots: dict[int, int] = {}
    for a, b in drawn.edges:
        for c in sorted(set(drawn[a]) & set(drawn[b])):
            if c < max(a, b):
                continue  # visit each triangle once, from its two smaller nodes
            row = number[frozenset((a, b))] ^ number[frozenset((a, c))] ^ number[frozenset((b, c))]
            while row and (top := row.bit_length()) in pivots:
                row ^= pivots[top]
            if row:
                pivots[row.bit_length()] = row
            if len(pivots) == most:
                return most
    return len(pivots)
