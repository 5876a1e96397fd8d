"""Shares of space and time against sums over dense weights, place by place."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

import headwater as hw
from headwater.lens.loading import zoo


def by_hand(weights: torch.Tensor, places: list[tuple[int, int, int] | None], reach: int) -> np.ndarray:
    """Shares [kind] of one map [query, key]; None stands for a token that is no patch."""
    found = np.zeros(4)
    patches = [i for i, place in enumerate(places) if place]
    for i in patches:
        for j, key in enumerate(places):
            f, r, c = places[i]
            if key is None:
                kind = 3
            elif key[0] == f:
                kind = 0
            else:
                kind = 1 if abs(r - key[1]) <= reach and abs(c - key[2]) <= reach else 2
            found[kind] += float(weights[i, j]) / len(patches)
    return found


@pytest.mark.parametrize(("name", "prefix", "reach"), [("videomae", 0, 0), ("vivit", 1, 1)])
def test_shares_are_those_of_dense_weights(name, prefix, reach):
    model, film = hw.load(zoo.build(name)), torch.randn(2, 4, 3, 16, 16)
    record = model.record(pixel_values=film)
    (grid,) = record.grids[0]
    places = [None] * prefix + [tuple(place) for place in grid.coordinates().tolist()]
    found = hw.analyses.space_time(record, reach=reach, draws=10)
    weights = record.pattern(1)
    for row, head in ((0, 0), (1, 3)):
        got = found.per_example.sel(batch=row, layer=1, head=head)
        np.testing.assert_allclose(got, by_hand(weights[row, head].double(), places, reach), atol=1e-6)
    uniform = torch.full((len(places), len(places)), 1 / len(places))
    np.testing.assert_allclose(found.chance, by_hand(uniform, places, reach), atol=1e-6)
    np.testing.assert_allclose(found.per_example.sum("kind"), 1.0, atol=1e-5)
    np.testing.assert_allclose(found.share, found.per_example.mean("batch"), atol=1e-12)


def test_chance_is_that_of_the_keys_that_are_seen(monkeypatch):
    """The patches of a causal text, taken for two frames of two columns, see no later ones."""
    ids = zoo.inputs("llava")
    record = hw.load(zoo.build("llava")).record(ids.pop("input_ids"), ids.pop("attention_mask"), **ids)
    grid = record.grids[0][0]._replace(frames=2, rows=1)
    monkeypatch.setattr(sys.modules["headwater.analyses.vision.space_time"], "_grid", lambda record: grid)
    places: list[tuple[int, int, int] | None] = [None] * record.valid.shape[1]
    for token, place in zip(grid.tokens().tolist(), grid.coordinates().tolist(), strict=True):
        places[token] = tuple(place)
    seen = torch.ones(len(places), len(places)).tril()
    found = hw.analyses.space_time(record, reach=0, draws=5)
    np.testing.assert_allclose(found.chance, by_hand(seen / seen.sum(-1, keepdim=True), places, 0), atol=1e-6)


def test_a_picture_is_refused_in_a_line():
    record = hw.load(zoo.build("vit")).record(pixel_values=zoo.inputs("vit")["pixel_values"])
    with pytest.raises(hw.HeadwaterError, match="no grid of several frames"):
        hw.analyses.space_time(record)
