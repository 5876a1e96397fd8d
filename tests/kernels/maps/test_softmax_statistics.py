"""The lean walk of plain softmax maps against the dense float64 reference, at sizes that take it through every branch.

Mutations seen to fail here: the rim of a causal block not hidden, a strip's offset left out of argmax, the last strip
of a width that is no multiple of 64 forgotten, HIDDEN as -inf (0 times it is NaN), the factor ln 2 of the entropy left
out, the anchor of the distance one row off, rims shared between masks that differ by batch row, strips of the table
counted per head and not per row, a negative scale in the lean walk.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from limits import block_elements
from plain_maps import MASKS, build, check

from headwater.kernels.attend import attend
from headwater.kernels.maps import softmax_statistics, statistics
from headwater.kernels.reference import dense as reference
from headwater.kernels.rules.rule import ScoreRule
from headwater.kernels.tiles.mask import Mask


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("length", [1, 2, 64, 333])
def test_every_statistic_under_every_band(kind, length):
    mask = MASKS[kind](max(length, 33) if kind in ("cache", "moved window", "cross") else length)
    check(*build(mask, sinks=length == 64))


@pytest.mark.parametrize("elements", [1, 3000, 2**16])
def test_blocks_of_any_size_give_the_same(elements):
    with block_elements(elements):
        check(*build(MASKS["causal"](300), batch=3))


def test_padding_documents_and_functions_hide_per_batch_row():
    positions = torch.arange(290)
    left, right = positions >= 100, positions < 270
    real = torch.stack([left, right])
    check(*build(Mask(290, 290, right=0, valid_keys=real, valid_queries=real)))
    some = lambda b, h, i, j: ((i + j + b + h) % 3 != 0) & (j <= i)  # noqa: E731
    check(*build(Mask(290, 290, extra=some)))


@pytest.mark.parametrize("size", [0.0, 1e3])
def test_equal_and_one_hot_rows(size):
    mask = MASKS["causal"](300)
    q, k, v, rule = build(mask, size=size, dtype=torch.float64)
    check(q, k, v, rule, exact=1e-6)
    _, map = attend(q.float(), k.float(), v.float(), rule)
    found = statistics.compute(map, softmax_statistics.NAMES)
    assert (found["max"] <= 1).all()
    assert (found["entropy"] >= 0).all()


def test_half_precision_is_measured_in_float32():
    q, k, v, rule = build(MASKS["causal"](100), dtype=torch.bfloat16)
    _, map = attend(q, k, v, rule, backend="blocked")
    exact = reference.statistics(reference.attend(q.float(), k.float(), v.float(), rule), rule)
    torch.testing.assert_close(map.statistic("received").double(), exact["received"], atol=1e-4, rtol=1e-4)


def test_names_asked_for_alone_are_those_of_all():
    _, map = attend(*build(MASKS["causal"](280)))
    every = statistics.compute(map, softmax_statistics.NAMES)
    for name in softmax_statistics.NAMES:
        torch.testing.assert_close(map.statistic(name), every[name], equal_nan=True, atol=1e-6, rtol=1e-6)


def test_the_argmax_of_equal_keys_is_one_of_them():
    """Which one is up to the processor: its product may round the last columns of a tile differently."""
    torch.manual_seed(0)
    q, k = torch.randn(1, 4, 257, 32), torch.randn(1, 4, 257, 32)
    k[:, :, ::2] = k[:, :, :1]
    _, map = attend(q, k, k, ScoreRule(0.3, Mask(257, 257, right=0)))
    place = map.statistic("argmax")
    assert (place >= 0).all()
    assert (place <= torch.arange(257)).all()
    torch.testing.assert_close(map.at(place[..., None])[..., 0], map.dense().amax(-1), rtol=1e-5, atol=0)


@pytest.mark.parametrize("scale", [0.0, -0.4])
def test_a_scale_of_zero_or_below_goes_the_general_way(scale):
    """The lean walk divides by the scale, and hides pairs before it multiplies by it."""
    q, k, v, rule = build(MASKS["causal"](20))
    rule = replace(rule, scale=scale)
    _, map = attend(q, k, v, rule)
    assert not softmax_statistics.takes(map)
    wanted = reference.statistics(reference.attend(q, k, v, rule), rule)
    for name in ("entropy", "max", "received", "distance"):
        torch.testing.assert_close(map.statistic(name).double(), wanted[name], atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("what", ["softcap", "bias", "gradient"])
def test_what_is_not_plain_goes_the_general_way(what):
    q, k, v, rule = build(MASKS["causal"](20))
    if what == "softcap":
        rule = ScoreRule(0.4, rule.mask, softcap=3.0)
    if what == "bias":
        rule = ScoreRule(0.4, rule.mask, bias=torch.randn(1, 4, 1, 20))
    _, map = attend(q, k, v, rule)
    if what == "gradient":
        map.q.requires_grad_()
    assert not softmax_statistics.takes(map)
