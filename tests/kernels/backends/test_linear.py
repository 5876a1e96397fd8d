"""The running sums of linear attention against blocks of rows.

Mutation seen to fail here: no lower bound on Z under identity features.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from comparison import near
from small_maps import CAUSAL, HEADS, WIDTH, problem
from wide_cases import NORMALISERS

from headwater.kernels.attend import attend
from headwater.kernels.backends.choose import choose_for
from headwater.kernels.rules.normaliser import Normaliser
from headwater.kernels.rules.rule import ScoreRule
from headwater.kernels.tiles.mask import Mask


def linear_kinds():
    masks = {
        "causal": Mask(300, 300, right=0),
        "ahead": Mask(140, 140, right=5),
        "full": Mask(150, 140),
        "cache": Mask(3, 200, right=0, query_offset=197),
        "fewer": Mask(200, 90, right=0),
        "late": Mask(140, 150, right=0, query_offset=20, key_offset=15),
        "nothing": Mask(4, 0),
    }
    kinds = [kind for kind in NORMALISERS if kind.name == "linear"]
    return [
        pytest.param(mask, kinds[i % len(kinds)], id=name) for i, (name, mask) in enumerate(masks.items())
    ]


@pytest.mark.parametrize(("mask", "kind"), linear_kinds())
def test_running_sums_are_the_map_of_linear_attention(mask, kind):
    """Output, L, and the products both ways, over several chunks, against blocks of rows; padding left and right."""
    torch.manual_seed(1)
    q, k, v = (
        torch.randn(2, heads, n, WIDTH).double()
        for heads, n in ((HEADS, mask.queries), (2, mask.keys), (2, mask.keys))
    )
    valid = torch.arange(mask.keys)[None] >= torch.tensor([[0], [mask.keys // 3]])
    sinks = None if kind.features == "identity" else torch.rand(HEADS)
    for real in (None, valid, valid.flip(0, 1)):
        rule = ScoreRule(0.4, replace(mask, valid_keys=real), normaliser=kind, sinks=sinks)
        z, map = attend(q, k, v, rule, (), "running")
        assert choose_for(map).name == choose_for(map, transposed=True).name == "running"
        expected, blocks = attend(q, k, v, rule, (), "blocked")
        blocks = replace(blocks, backend="blocked")
        near(z, expected, 1e-8)
        near(map.lse, blocks.lse, 1e-9)
        x, y = torch.randn(2, HEADS, mask.keys, 3).double(), torch.randn(mask.queries, 2).double()
        near(map @ x, blocks @ x, 1e-8)
        near(map.T @ y, blocks.T @ y, 1e-8)


def test_running_sums_refuse_by_name():
    q, k, v = problem()
    kind = Normaliser("linear")
    for rule, reason in (
        (ScoreRule(0.4, CAUSAL), "weights that are no products of features"),
        (ScoreRule(0.4, CAUSAL, normaliser=kind, softcap=3.0), "scores that are no products of features"),
        (ScoreRule(0.4, replace(CAUSAL, left=2), normaliser=kind), "a sliding window"),
    ):
        with pytest.raises(ValueError, match=f"running can not compute {reason}"):
            attend(q, k, v, rule, (), "running")
