"""Plain softmax maps behind bands of every kind, and their statistics held to the dense float64 reference."""

from __future__ import annotations

import torch
from comparison import within
from torch import Tensor

from headwater.kernels.attend import attend
from headwater.kernels.maps import softmax_statistics, statistics
from headwater.kernels.maps.attention_map import AttentionMap
from headwater.kernels.reference import dense as reference
from headwater.kernels.rules.rule import ScoreRule
from headwater.kernels.tiles.mask import Mask

NAMES = softmax_statistics.NAMES
MASKS = {
    "causal": lambda n: Mask(n, n, right=0),
    "full": lambda n: Mask(n, n),
    "window": lambda n: Mask(n, n, left=37, right=0),
    "both sides": lambda n: Mask(n, n, left=90, right=20),
    "cache": lambda n: Mask(n - 30, n, right=0, query_offset=30),
    "moved window": lambda n: Mask(n - 30, n - 10, left=50, right=0, query_offset=30, key_offset=10),
    "nothing seen": lambda n: Mask(n, n, right=-3),
    "cross": lambda n: Mask(n - 25, n),
}


def build(
    mask: Mask, batch: int = 2, size: float = 2.0, sinks: bool = False, dtype: torch.dtype = torch.float32,
    heads: tuple[int, int] = (4, 2), width: int = 8,
) -> tuple[Tensor, Tensor, Tensor, ScoreRule]:  # fmt: skip
    """q, k, v and their rule; `heads` of queries and of keys."""
    generator = torch.Generator().manual_seed(mask.queries)
    q = torch.randn(batch, heads[0], mask.queries, width, generator=generator) * size
    k, v = (torch.randn(batch, heads[1], mask.keys, width, generator=generator) for _ in range(2))
    rule = ScoreRule(0.4, mask, sinks=torch.tensor([0.5, -1.0, 4.0, 0.0])[: heads[0]] if sinks else None)
    return (*(x.to(dtype) for x in (q, k, v)), rule)  # pyright: ignore[reportReturnType]


def check(q: Tensor, k: Tensor, v: Tensor, rule: ScoreRule, exact: float = 3e-5) -> AttentionMap:
    """Hold every statistic of the plain walks to the reference."""
    _, map = attend(q, k, v, rule)
    assert softmax_statistics.takes(map)
    dense = reference.attend(q, k, v, rule)
    if (real := rule.mask.valid_queries) is not None:
        dense = dense._replace(weights=dense.weights * real[:, None, :, None])
    expected = reference.statistics(dense, rule)
    found = statistics.compute(map, NAMES)
    for name in NAMES:
        scale = {"distance": 100, "received": 50, "entropy": 10}.get(name, 1)
        if name == "argmax":
            top = dense.weights.gather(-1, found[name].clamp_min(0)[..., None])[..., 0]
            torch.testing.assert_close(
                top.nan_to_num(), expected["max"].nan_to_num(), atol=exact, rtol=1e-4, msg="argmax"
            )
            assert ((found[name] < 0) == (expected[name] < 0)).all()
            continue
        within(found[name], expected[name], exact * scale, 3e-5, name)
    return map
