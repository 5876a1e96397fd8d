"""Random attention problems for the kernel tests: rule × groups × shape × edits, drawn by hypothesis.

`cases()` is what every backend is asked for, `cases(plain=True)` what torch's fused kernel takes; `cases(wide=True)`
adds what the blocks of rows alone take: every normaliser, every edit, documents, ALiBi (`wide_cases.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import wide_cases
from hypothesis import strategies as st
from torch import Tensor

from headwater.kernels.edits.scores import BlockScores, ScaleScores
from headwater.kernels.edits.weights import MixIdentity, Rescale
from headwater.kernels.reference import dense as reference
from headwater.kernels.rules.rule import ScoreRule
from headwater.kernels.tiles.mask import Mask


@dataclass
class Case:
    q: Tensor
    k: Tensor
    v: Tensor
    rule: ScoreRule
    edits: tuple
    groups: Tensor

    def __repr__(self) -> str:
        return f"Case(q={tuple(self.q.shape)}, k={tuple(self.k.shape)}, rule={self.rule}, edits={self.edits})"


@st.composite
def cases(draw, edited: bool | None = None, plain: bool = False, wide: bool = False):
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    batch, kv_heads, group = (
        draw(st.integers(1, 3)),
        draw(st.integers(1, 2)),
        draw(st.sampled_from([1, 2, 4])),
    )
    heads = kv_heads * group
    queries = draw(st.sampled_from([1, 2, 3, 17, 33]))
    width, value_width = draw(st.sampled_from([4, 8])), draw(st.sampled_from([3, 8, 11]))
    kind = draw(
        st.sampled_from(
            ["causal", "full", "cross"] if plain else ["causal", "full", "window", "cache", "cross", "both"]
        )
    )
    keys = (
        queries
        if kind in ("causal", "full", "window", "both")
        else queries + draw(st.sampled_from([0, 1, 5, 20]))
    )
    offset = keys - queries if kind == "cache" else 0
    left = {"window": 2, "both": 3, "cache": draw(st.sampled_from([None, 4]))}.get(kind)
    right = {"causal": 0, "window": 0, "cache": 0, "both": 3}.get(kind)

    valid_keys = valid_queries = None
    if draw(st.booleans()):
        lengths = torch.randint(0 if not plain else 1, keys + 1, (batch, 1), generator=generator)
        columns = torch.arange(keys)
        valid_keys = columns >= keys - lengths if draw(st.booleans()) else columns < lengths
        if keys == queries:
            valid_queries = valid_keys
    extra = None
    if not plain and draw(st.integers(0, 4)) == 0:
        extra = lambda b, h, i, j: ((i + 2 * j + b) % 3 != 0) | (i == j)  # noqa: E731
    mask = Mask(queries, keys, left, right, offset, 0, valid_keys, valid_queries, extra)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    bias = (
        None
        if draw(st.booleans())
        else normal(*draw(st.sampled_from([(1, heads, queries, keys), (batch, 1, 1, keys)])))
    )
    # a learned sink, or one whose logit depends on the query
    sinks = draw(st.sampled_from([None, None, (heads,), (batch, heads, queries)]))
    sinks = None if sinks is None else normal(*sinks) * 3
    softcap = 5.0 if not plain and draw(st.integers(0, 3)) == 0 else None
    some = torch.rand(heads, generator=generator) < 0.6
    chosen_keys = torch.rand(batch, keys, generator=generator) < 0.4
    chosen_queries = torch.rand(1, queries, generator=generator) < 0.5
    wants = (draw(st.booleans()) if edited is None else edited) and not plain
    # at scores of several hundred float32 knows a tiny weight to 1e-4 only, and moving mass onto it shows that
    size = draw(st.sampled_from([0.0, 1.0, 4.0 if wants else 30.0]))
    score_edits = (
        [ScaleScores(some, draw(st.sampled_from([0.5, 2.0])))] if wants and draw(st.booleans()) else []
    )
    if wants and draw(st.booleans()):
        score_edits.append(BlockScores(some, chosen_queries, chosen_keys))
    edits = (
        [Rescale(some, chosen_keys, ~chosen_keys, draw(st.sampled_from([0.0, 0.4, 0.9])))] if wants else []
    )
    if wants and draw(st.booleans()):
        edits.append(MixIdentity(~some, 0.3))
    if wants and draw(st.booleans()):
        edits.append(Rescale(~some, chosen_keys, torch.roll(chosen_keys, 1, -1) & ~chosen_keys, 0.5))
    rule = ScoreRule(width**-0.5, mask, softcap, sinks, bias, tuple(score_edits))
    if wide:
        shape = wide_cases.Shape(batch, heads, queries, keys)
        rule, edits = wide_cases.widened(draw, generator, rule, shape, edited)
    q, k = normal(batch, heads, queries, width) * size, normal(batch, kv_heads, keys, width)
    groups = torch.rand(3, keys, generator=generator) < 0.3
    return Case(q, k, normal(batch, kv_heads, keys, value_width), rule, tuple(edits), groups)


def wanted(case: Case) -> reference.Dense:
    """The reference, its rows of padding emptied."""
    dense = reference.attend(case.q, case.k, case.v, case.rule, case.edits)
    valid = case.rule.mask.valid_queries
    return dense if valid is None else dense._replace(weights=dense.weights * valid[:, None, :, None])


def sees_something(case: Case) -> reference.Dense:
    """The reference; rows that see no key have no weights, whatever an edit would keep there."""
    dense = reference.attend(case.q, case.k, case.v, case.rule, case.edits)
    return dense._replace(weights=torch.where(torch.isinf(dense.lse)[..., None], 0.0, dense.weights))


def rich(kind: str, device: str) -> Case:
    """Several tiles each way, two query heads per key head, and everything that one kind of model asks for at once."""
    torch.manual_seed(5)
    batch, heads, queries = (2 if kind == "padded" else 1), 2, 40
    keys = {"cross": 37, "cache": 51}.get(kind, queries)
    q = torch.randn(batch, heads, queries, 8, device=device) * 4
    k, v = (torch.randn(batch, 1, keys, width, device=device) for width in (8, 5))
    columns = torch.arange(keys)
    start = torch.tensor([[0], [9]])[:batch]
    valid, valid_queries = columns >= start, torch.arange(queries) >= start
    first = columns[None] < 12
    some = torch.tensor([True, False])
    block = BlockScores(some, torch.arange(queries)[None] % 3 == 0, columns[None] % 5 == 1)
    # the second edit moves mass that the first has made, and that the identity has kept
    edits = (Rescale(some, first, ~first, 0.3), MixIdentity(torch.tensor([True, True]), 0.25))
    edits += (Rescale(some, columns[None] % 4 == 0, columns[None] % 4 == 2, 0.5),)
    rule, edits = {
        "causal": (ScoreRule(0.3, Mask(queries, keys, right=0), sinks=torch.randn(heads)), ()),
        "padded": (
            ScoreRule(
                0.3,
                Mask(queries, keys, right=0, valid_keys=valid, valid_queries=valid_queries),
                softcap=3.0,
                edits=(block, ScaleScores(some, 1.7)),
            ),
            edits,
        ),
        "window": (ScoreRule(0.3, Mask(queries, keys, left=18, right=3)), edits),
        "cache": (
            ScoreRule(
                0.3,
                Mask(queries, keys, left=21, right=0, query_offset=11),
                bias=torch.randn(1, heads, 1, keys),
            ),
            (),
        ),
        "cross": (ScoreRule(0.3, Mask(queries, keys), bias=torch.randn(batch, 1, queries, keys)), ()),
    }[kind]
    return Case(q, k, v, rule, edits, torch.rand(16, keys) < 0.3)
