"""Rows of measured inputs, whatever axis the batch is on."""

import copy
import pickle

import torch

from headwater.lens.naming.measured import Measured
from headwater.lens.naming.tokens import Tokens


def made():
    ids = torch.arange(4).expand(3, 4).contiguous()
    frames = torch.arange(6)[:, None].expand(6, 2).contiguous()  # two rows for each example
    axes = {
        ("self", "queries"): Tokens(ids, torch.rand(3, 4) > 0.5),
        ("frames", "keys"): Tokens(frames, torch.ones(6, 2, dtype=torch.bool)),
    }
    more = {"x": torch.randn(3, 4), "y": torch.randn(5, 3, 2), "t": torch.randn(7)}
    return Measured.of(axes["self", "queries"], more, axes, {"x": 0, "y": 1, "t": None}, {})


def test_rows_take_what_belongs_to_them():
    given = made()
    some = given.rows([2, 0])
    assert some.more["x"].equal(given.more["x"][[2, 0]])
    assert some.more["y"].equal(given.more["y"][:, [2, 0]])
    assert some.more["t"].equal(given.more["t"])
    assert some.mask.equal(given.mask[[2, 0]])
    assert some.axes["frames", "keys"].ids[:, 0].tolist() == [4, 5, 0, 1]
    assert given.rows(slice(1, 2)).axes["frames", "keys"].ids[:, 0].tolist() == [2, 3]


def test_copies_keep_everything():
    given = made()
    for other in (copy.deepcopy(given), pickle.loads(pickle.dumps(given))):
        assert isinstance(other, Measured)
        assert other.rows([1]).axes["self", "queries"].mask.equal(given.mask[[1]])
        assert other.along == given.along
