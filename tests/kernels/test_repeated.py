"""`Repeated` gives what `attend` gives, bit for bit, and leaves everything else to it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from headwater.kernels.attend import attend
from headwater.kernels.edits.scores import ScaleScores
from headwater.kernels.repeated import Repeated
from headwater.kernels.rules.normaliser import Normaliser
from headwater.kernels.rules.rule import ScoreRule
from headwater.kernels.tiles.mask import Mask

CALLS = {  # batch, heads, kv heads, queries, keys, d_head, d_value, mask
    "causal": (2, 4, 2, 9, 9, 8, 8, Mask(9, 9, right=0)),
    "one token": (1, 1, 1, 1, 1, 4, 4, Mask(1, 1, right=0)),
    "a step of a generation": (1, 4, 1, 1, 7, 8, 8, Mask(1, 7, right=0, query_offset=6)),
    "bidirectional": (1, 2, 2, 5, 5, 8, 8, Mask(5, 5)),
    "unequal lengths": (2, 2, 1, 3, 8, 8, 8, Mask(3, 8)),
    "a window as wide as the text": (1, 2, 2, 6, 6, 8, 8, Mask(6, 6, left=5, right=0)),
    "narrow values": (1, 2, 2, 6, 6, 8, 4, Mask(6, 6, right=0)),
    "wide values": (1, 2, 2, 6, 6, 4, 8, Mask(6, 6, right=0)),
}


def tensors(batch, heads, kv_heads, queries, keys, width, value, mask, dtype=torch.float32):
    torch.manual_seed(0)
    shapes = ((heads, queries, width), (kv_heads, keys, width), (kv_heads, keys, value))
    q, k, v = (torch.randn(batch, *shape).to(dtype) for shape in shapes)
    return q, k, v, ScoreRule(width**-0.5, mask)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_what_attend_gives(call, dtype) -> None:
    q, k, v, rule = tensors(*call, dtype=dtype)
    with torch.no_grad():
        layers = Repeated.of(q, k, v, rule)
        assert layers is not None
        for seed in range(2):
            torch.manual_seed(seed)
            q, k, v = (torch.randn_like(x) for x in (q, k, v))
            z, lse = layers.attend(q, k, v)
            map = layers.map(q, k, lse)
            exact, of_attend = attend(q, k, v, rule)
            assert torch.equal(z, exact)
            assert z.dtype == exact.dtype
            assert torch.equal(map.lse, of_attend.lse)
            assert map.rule is rule
            assert (map.backend, map.steps, map.known) == (of_attend.backend, (), {})


OTHERS = {
    "a window": {"mask": Mask(9, 9, left=2, right=0)},
    "queries inside a cache": {"mask": Mask(5, 9, right=0, query_offset=4)},
    "padding": {"mask": Mask(9, 9, right=0, valid_keys=torch.arange(9)[None] > 0)},
    "rows without keys": {"mask": Mask(9, 9, right=-1)},
    "documents": {"mask": Mask(9, 9, right=0, documents=torch.arange(9)[None] // 4)},
    "a function": {"mask": Mask(9, 9, extra=lambda b, h, q, k: k <= q)},
    "a soft-cap": {"softcap": 5.0},
    "sinks": {"sinks": torch.zeros(4)},
    "a bias": {"bias": torch.zeros(1, 1, 1, 9)},
    "slopes": {"alibi": torch.ones(4)},
    "an edit": {"edits": (ScaleScores(torch.ones(4, dtype=torch.bool), 2.0),)},
    "another normaliser": {"normaliser": Normaliser("softmax1")},
    "a scale below 0": {"scale": -1.0},
}


@pytest.mark.parametrize("change", OTHERS.values(), ids=OTHERS.keys())
def test_everything_else_is_left_to_attend(change) -> None:
    q, k, v, rule = tensors(*CALLS["causal"])
    rule = replace(rule, **change)
    with torch.no_grad():
        assert Repeated.of(q[:, :, : rule.mask.queries], k, v, rule) is None


def test_gradients_are_left_to_attend_and_what_does_not_fit_is_refused() -> None:
    q, k, v, rule = tensors(*CALLS["causal"])
    assert Repeated.of(q, k, v, rule) is None
    with torch.no_grad():
        assert Repeated.of(q, k, v.double(), rule) is None
        with pytest.raises(ValueError, match="multiple of those of k"):
            Repeated.of(q, k[:, :1].expand(-1, 3, -1, -1), v[:, :1].expand(-1, 3, -1, -1), rule)
