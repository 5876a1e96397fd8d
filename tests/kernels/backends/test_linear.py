"""Packed documents, ALiBi and the running sums of linear attention, each against another way to the same numbers.

Mutations seen to fail here: no lower bound on Z under identity features (running sums and blocks then disagree).
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from small_maps import CAUSAL, FULL, HEADS, WIDTH, N, dense, fitting, map_of, near, problem
from wide_cases import NORMALISERS

from headwater.kernels.attend import attend
from headwater.kernels.rules.normaliser import Normaliser
from headwater.kernels.rules.rule import ScoreRule
from headwater.kernels.tiles.mask import Mask, document_ids

EVERY = pytest.mark.parametrize("kind", NORMALISERS, ids=str)


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
        assert map.engine() == map.engine(transposed=True) == "running"
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
        with pytest.raises(ValueError, match=f"running sums can not compute {reason}"):
            attend(q, k, v, rule, (), "running")


@EVERY
def test_packed_documents_are_what_each_is_alone(kind):
    """No position is counted from the document's beginning: scores here do not depend on positions."""
    starts = torch.tensor([[0, 2, 7], [0, 5, 8]])
    ids = document_ids(starts, N)
    assert ids.tolist() == [[0, 0, 1, 1, 1, 1, 1, 2, 2], [0, 0, 0, 0, 0, 1, 1, 1, 2]]
    q, k, v = problem()
    right = fitting(kind).right
    rule = ScoreRule(0.4, Mask(N, N, right=right, documents=ids), normaliser=kind, alibi=torch.rand(HEADS))
    together = attend(q, k, v, rule)[0]
    if kind.name == "sinkhorn":
        return  # its marginals are of the whole sequence
    for b in range(2):
        for begin, end in zip(starts[b].tolist(), [*starts[b, 1:].tolist(), N], strict=True):
            part = [x[b : b + 1, :, begin:end] for x in (q, k, v)]
            alone = attend(*part, replace(rule, mask=Mask(end - begin, end - begin, right=right)))[0]
            near(together[b : b + 1, :, begin:end], alone, 1e-12)


def test_alibi_is_a_bias_by_distance_and_moves_with_the_cache():
    q, k, v = problem()
    slopes = 2.0 ** -torch.arange(1.0, HEADS + 1)
    far = (torch.arange(N)[:, None] - torch.arange(N)).abs()
    bias = -slopes[None, :, None, None] * far
    for mask in (CAUSAL, FULL):
        near(dense(map_of(mask, None, alibi=slopes)), dense(map_of(mask, None, bias=bias)), 1e-7)
    # as models write it, with the last key at 0: the same weights behind a causal mask
    written = slopes[None, :, None, None] * (torch.arange(N) - N + 1)
    near(dense(map_of(CAUSAL, None, alibi=slopes)), dense(map_of(CAUSAL, None, bias=written)), 1e-6)
    late = Mask(2, N - 3, right=0, query_offset=N - 2, key_offset=3)
    part = dense(map_of(late, None, (q[:, :, -2:], k[:, :, 3:], v[:, :, 3:]), alibi=slopes))
    whole = dense(map_of(CAUSAL, None, alibi=slopes))[:, :, -2:, 3:]
    near(part, whole / whole.sum(-1, keepdim=True), 1e-12)


def test_documents_of_the_wrong_shape_are_refused():
    with pytest.raises(
        ValueError, match=r"whole numbers \[batch, at least 9 positions\], got torch.int64 \(1, 4\)"
    ):
        Mask(4, 4, query_offset=5, documents=torch.zeros(1, 4, dtype=torch.long))
    with pytest.raises(ValueError, match="in order"):
        document_ids(torch.tensor([[0, 5, 3]]), 9)
