"""The state of a corpus: examples and the sample of texts do not depend on the order of texts."""

from __future__ import annotations

import itertools

import numpy as np

from headwater.analyses._corpora import state as module
from headwater.analyses._corpora.state import TOP, State


def one(row: int, values: list[float], keep: int) -> State:
    """A state that has seen one text, with values for two heads."""
    found = State.empty(1, 2, keep)
    found.top_value[0, 0, :, 0] = values
    found.top_text[0, 0, :, 0] = row
    found.sample, found.sampled = np.array([row]), np.zeros((1, 1, 2), np.float32)
    found.kept[row] = (str(row), np.array([row]))
    return found


def test_the_largest_are_kept_and_of_equal_ones_the_earlier() -> None:
    texts = [(0, [0.5, 1.0]), (1, [0.9, 1.0]), (2, [0.5, 1.0]), (3, [0.1, 2.0])]
    for order in itertools.permutations(texts):
        found = State.empty(1, 2, 3)
        for row, values in order:
            found.merge(one(row, values, 3))
        assert found.top_text[0, 0].tolist() == [[1, 0, 2], [3, 0, 1]]
        assert found.top_value[0, 0, 0].tolist() == [np.float32(0.9), 0.5, 0.5]
        assert (found.top_text[1:] == -1).all()
    assert len(TOP) == 4


def test_the_sample_is_the_same_in_any_order(monkeypatch) -> None:
    monkeypatch.setattr(module, "SAMPLE", 5)
    samples = []
    for seed in range(3):
        found = State.empty(1, 2, 1)
        for row in np.random.default_rng(seed).permutation(40).tolist():
            found.merge(one(row, [0.0, 0.0], 1))
        found.prune()
        samples.append(found.sample.tolist())
        assert set(found.sample.tolist()) <= set(found.kept)
        assert len(found.kept) <= 6
    assert samples[0] == samples[1] == samples[2]
    assert sorted(samples[0]) != list(range(5))  # drawn, not the first ones
