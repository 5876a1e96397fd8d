"""Bins and sums of a corpus."""

from __future__ import annotations

import numpy as np

from headwater.analyses._corpora.statistics import EDGES, NAMES, bins_of, edges, parts_of, sum_of


def test_each_number_lies_between_the_edges_of_its_bin() -> None:
    for kind, ends in EDGES.items():
        values = np.concatenate([ends[:-1], (ends[:-1] + ends[1:]) / 2, [0, ends[-1]]])
        name = next(name for name in NAMES if edges(name) is ends)
        every = np.full((len(NAMES), len(values)), np.nan)
        every[NAMES.index(name)] = values
        found = bins_of(every)[NAMES.index(name)]
        assert (ends[found] <= values).all(), kind
        assert ((values < ends[found + 1]) | (values == ends[-1])).all(), kind
    assert (bins_of(np.full((len(NAMES), 2), np.nan)) == -1).all()


def test_sums_are_equal_in_any_order() -> None:
    """A plain sum of floats is not: that is why whole numbers are kept."""
    values = np.random.default_rng(1).exponential(10.0 ** np.arange(8), (1000, 8))
    orders = [np.random.default_rng(seed).permutation(1000) for seed in range(3)]
    sums = [sum_of(sum(parts_of(values[i]) for i in order)) for order in orders]
    assert (sums[0] == sums[1]).all() and (sums[1] == sums[2]).all()  # noqa: PT018
    np.testing.assert_allclose(sums[0], values.sum(0), rtol=1e-11)
