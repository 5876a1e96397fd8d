"""The reference itself, against torch's own attention in float64 and loops over single weights.

Mutations seen to fail here: the query group taken modulo the key heads, the sink's weight kept, the freed mass shared
equally instead of in proportion.
"""

from __future__ import annotations

import math

import pytest
import torch
from comparison import near

from headwater.kernels.edits.weights import Rescale
from headwater.kernels.reference import dense as reference
from headwater.kernels.rules.rule import ScoreRule
from headwater.kernels.tiles.mask import Mask


def problem() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(2, heads, 6, 4, generator=generator).double() for heads in (4, 2, 2))


@pytest.mark.parametrize("kind", ["causal", "window", "bias", "padded"])
def test_the_softmax_is_torchs_own(kind):
    """Torch's attention takes the mask and the bias as one tensor that is added to the scores."""
    q, k, v = problem()
    far = torch.arange(6)[:, None] - torch.arange(6)
    real = torch.arange(6) >= torch.tensor([[0], [2]])
    bias = torch.randn(1, 4, 6, 6).double()
    mask, hidden = {
        "causal": (Mask(6, 6, right=0), far < 0),
        "window": (Mask(6, 6, left=2, right=1), (far > 2) | (far < -1)),
        "bias": (Mask(6, 6), far > 6),
        "padded": (Mask(6, 6, valid_keys=real), ~real[:, None, None]),
    }[kind]
    added = torch.zeros(2, 4, 6, 6).double().masked_fill(hidden, -torch.inf)
    rule = ScoreRule(0.3, mask, bias=bias if kind == "bias" else None)
    added = added + bias if kind == "bias" else added
    found = reference.attend(q, k, v, rule)
    given = {"attn_mask": added, "scale": 0.3, "enable_gqa": True}
    near(found.z, torch.nn.functional.scaled_dot_product_attention(q, k, v, **given))
    near(found.weights.sum(-1), torch.ones(2, 4, 6))


def test_a_sink_and_a_soft_cap_weight_by_weight():
    q, k, v = problem()
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0])
    found = reference.attend(q, k, v, ScoreRule(0.3, Mask(6, 6, right=0), softcap=1.5, sinks=sinks))
    for b, h, i in ((0, 0, 0), (1, 3, 5), (0, 2, 4)):
        scores = [1.5 * math.tanh(0.3 * float(q[b, h, i] @ k[b, h // 2, j]) / 1.5) for j in range(i + 1)]
        total = math.exp(float(sinks[h])) + sum(map(math.exp, scores))
        expected = [math.exp(s) / total for s in scores] + [0.0] * (5 - i)
        near(found.weights[b, h, i], torch.tensor(expected).double(), 1e-6)  # torch.tensor rounds to float32
        assert float(found.lse[b, h, i]) == pytest.approx(math.log(total))


def test_freed_mass_goes_to_the_others_in_proportion():
    q, k, v = problem()
    first = (torch.arange(6) == 0)[None]
    rule, heads = ScoreRule(0.3, Mask(6, 6, right=0)), torch.tensor([True, False, True, True])
    plain = reference.attend(q, k, v, rule).weights
    found = reference.attend(q, k, v, rule, (Rescale(heads, first, ~first, 0.25),)).weights
    near(found[:, 1], plain[:, 1])
    near(found[:, :, 0], plain[:, :, 0])  # a first row has nobody else to give to
    row, new = plain[1, 2, 4], found[1, 2, 4]
    near(new[0], 0.25 * row[0])
    near(new[1:], row[1:] * (1 + 0.75 * row[0] / row[1:].sum()))


def test_statistics_of_a_map_by_hand():
    weights = torch.tensor([[1.0, 0, 0], [0.25, 0.75, 0], [0.5, 0, 0.5]]).double()[None, None]
    lse = torch.zeros(1, 1, 3).double()
    rule = ScoreRule(1.0, Mask(3, 3, right=0))
    found = reference.statistics(reference.Dense(weights, lse, weights), rule, window=1)
    expected = {
        "max": [1, 0.75, 0.5], "argmax": [0, 1, 0], "self": [1, 0.75, 0.5], "previous": [0, 0.25, 0],
        "first": [1, 0.25, 0.5], "distance": [0, 0.25, 1], "distance_squared": [0, 0.25, 2],
        "windowed_distance": [0, 0.25, 0.5], "row_mass": [1, 1, 1], "received": [1.75, 0.75, 0.5],
        "visible": [3, 2, 1], "sink": [1.75 / 3, 0.375, 0.5],
    }  # fmt: skip
    for name, values in expected.items():
        near(found[name][0, 0], torch.tensor(values).double(), 1e-7, name)
    assert float(found["entropy"][0, 0, 2]) == pytest.approx(math.log(2))
