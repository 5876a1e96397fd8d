"""Samples of weights: a change of any row or column of a matrix is seen, and nothing else is taken for one.

Seen to fail with steps as long as a row: one column was looked at.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from headwater.lens.digest.samples import LEAST, MOST, Samples


def _weights() -> dict[str, Tensor]:
    torch.manual_seed(0)
    shapes = {
        "wide": (600, 700),
        "tall": (3000, 576),
        "conv": (64, 32, 3, 3),
        "norm": (576,),
        "long": (100_000,),
    }
    found = {name: torch.randn(shape) for name, shape in shapes.items()}
    found |= {"half": torch.randn(700, 600).half(), "learned": nn.Parameter(torch.randn(80, 90))}
    found |= {
        "one": torch.tensor(3.0),
        "flags": torch.tensor([True, False]),
        "nan": torch.full((9,), torch.nan),
    }
    return found | {"empty": torch.empty(0), "across": torch.randn(70, 90).mT}


def _moved(weights: dict[str, Tensor], before: Samples) -> set[str]:
    return Samples.of(weights.items()).other_than(before)


def test_nothing_has_moved_where_nothing_changed() -> None:
    weights = _weights()
    before = Samples.of([*weights.items(), ("text", "no tensor")])
    assert _moved(weights, before) == set()
    assert before.other_than(None) == weights.keys() - {"empty", "across"}
    assert max(sum(names.values()) for names in before.names.values()) < 5 * MOST


@pytest.mark.parametrize("name", ["wide", "tall", "half", "learned"])
@pytest.mark.parametrize("row", [0, 0.37, 1])
def test_a_row_of_a_matrix_is_seen(name: str, row: float) -> None:
    weights = _weights()
    before = Samples.of(weights.items())
    weights[name].data[round(row * (len(weights[name]) - 1))] = 0
    assert _moved(weights, before) == {name}


@pytest.mark.parametrize("name", ["wide", "tall", "half", "learned"])
def test_some_columns_of_a_matrix_are_seen(name: str) -> None:
    weights = _weights()
    width = weights[name].shape[1]
    assert width > LEAST // 10
    before = Samples.of(weights.items())
    weights[name].data[:, width // 2 : width // 2 + 2].numpy()[:] = 0
    assert _moved(weights, before) == {name}


def test_every_number_of_a_small_tensor_is_seen() -> None:
    for place in (0, 100, 575):
        weights = _weights()
        before = Samples.of(weights.items())
        weights["norm"].data[place] += 1e-3
        assert _moved(weights, before) == {"norm"}


def test_what_comes_is_cast_or_grows_has_moved() -> None:
    weights = _weights()
    before = Samples.of(weights.items())
    weights |= {"new": torch.ones(3), "norm": weights["norm"].double(), "one": torch.ones(2)}
    del weights["long"]
    assert _moved(weights, before) == {"new", "norm", "one"}
