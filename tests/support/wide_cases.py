"""What the widest attention problems add to the usual: normalisers, every edit, documents, ALiBi, a moved cache."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

from headwater.kernels.attend import attend
from headwater.kernels.edits import patterns
from headwater.kernels.edits.mixing import ConvolveScores, MixHeads
from headwater.kernels.edits.scores import (
    BiasKeys,
    BlockScores,
    EmphasiseScores,
    MaskScores,
    ScaleScores,
    ScoreEdit,
)
from headwater.kernels.edits.weights import (
    MixIdentity,
    MixPattern,
    Rescale,
    RowCondition,
    ScaleKeys,
    WeightEdit,
)
from headwater.kernels.rules.normaliser import Normaliser
from headwater.kernels.rules.rule import ScoreRule
from headwater.kernels.tiles.mask import Mask

NORMALISERS = (
    Normaliser("softmax"),
    Normaliser("softmax1"),
    Normaliser("sigmoid", bias=-1.5),
    Normaliser("sigmoid_normalised"),
    Normaliser("cog"),
    Normaliser("softplus"),
    Normaliser("lssa"),
    Normaliser("elu1"),
    Normaliser("elu1", normalise=False),
    Normaliser("linear"),
    Normaliser("linear", features="relu"),
    Normaliser("linear", features="identity"),
    Normaliser("linear", normalise=False),
    Normaliser("sinkhorn", iterations=1),
    Normaliser("sinkhorn", iterations=5),
)


class Shape(NamedTuple):
    batch: int
    heads: int
    queries: int
    keys: int


class Drawn:
    """Random sets and numbers of one problem, all from its generator."""

    def __init__(self, draw: Callable[..., Any], generator: torch.Generator, shape: Shape) -> None:
        self.draw, self.generator, self.shape = draw, generator, shape

    def among(self, *values: Any) -> Any:
        return self.draw(st.sampled_from(values))

    def some(self, *shape: int, share: float = 0.5) -> Tensor:
        return torch.rand(*shape, generator=self.generator) < share

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def batches(self) -> int:
        return self.among(1, self.shape.batch)

    def heads(self) -> Tensor:
        """Some heads: the same in all batch rows, or not."""
        rows = self.among(0, self.shape.batch)
        return self.some(*((rows,) if rows else ()), self.shape.heads, share=0.6)

    def keys(self, share: float = 0.4) -> Tensor:
        return self.some(self.batches(), self.shape.keys, share=share)

    def queries(self) -> Tensor:
        return self.some(self.batches(), self.shape.queries)

    def rows(self) -> Tensor | None:
        if self.among(False, True):
            return None
        return self.some(self.batches(), self.among(1, self.shape.heads), self.shape.queries, share=0.6)


def widened(draw, generator, rule: ScoreRule, shape: Shape, edited: bool | None) -> tuple[ScoreRule, tuple]:
    """The rule with more in it, and weight edits for it."""
    drawn = Drawn(draw, generator, shape)
    mask = rule.mask
    if mask.query_offset and drawn.among(False, True):
        # the cache has lost its first keys
        mask = replace(mask, query_offset=mask.query_offset + 3, key_offset=3)
    longest = max(mask.queries + mask.query_offset, mask.keys + mask.key_offset)
    if drawn.among(False, False, True):
        documents = torch.randint(0, 3, (drawn.batches(), longest), generator=generator)
        mask = replace(mask, documents=documents.sort(-1).values if drawn.among(False, True) else documents)
    slopes = drawn.normal(shape.heads).abs() if drawn.among(False, False, True) else None
    rule = replace(rule, mask=mask, alibi=slopes, edits=(), normaliser=None)
    if drawn.among(False, True):
        kind = drawn.among(*NORMALISERS)
        one_way = mask.left is not None or mask.right is not None or mask.extra is not None
        if kind.name != "sinkhorn" or not (one_way or rule.sinks is not None):
            rule = replace(rule, normaliser=kind)
    if edited is False:
        return rule, ()
    count = draw(st.integers(0 if edited is None else 1, 3))
    weight_edits = tuple(weight_edit(drawn, rule) for _ in range(count))
    return replace(
        rule, edits=tuple(score_edit(drawn, bool(mask.query_offset)) for _ in range(draw(st.integers(0, 3))))
    ), weight_edits


def mixture(drawn: Drawn) -> MixHeads:
    """A mixture of heads near the identity, in some cases by query or by key."""
    heads = drawn.shape.heads

    def near_nothing(*shape: int) -> Tensor:
        return drawn.normal(drawn.batches(), *shape, heads, heads) * 0.3

    of_query = near_nothing(drawn.shape.queries) if drawn.among(False, True) else None
    of_key = near_nothing(drawn.shape.keys) if drawn.among(False, True) else None
    return MixHeads(torch.eye(heads) + near_nothing(), of_query, of_key)


def score_edit(drawn: Drawn, moved: bool) -> ScoreEdit:
    kind = drawn.among("scale", "block", "bias", "emphasise", "mask", "mix", "convolve")
    if kind == "mix":
        return mixture(drawn)
    if kind == "convolve":
        back = 1 if moved else drawn.among(1, 3)
        wide = drawn.among(1, 4)
        kernel = drawn.normal(drawn.batches(), drawn.shape.heads, back, wide)
        return ConvolveScores(kernel / (back * wide) ** 0.5, drawn.among(0, 1))
    heads, batch = drawn.heads(), drawn.batches()
    if kind == "scale":
        return ScaleScores(heads, drawn.among(0.5, 2.0, 0.0))
    if kind == "block":
        return BlockScores(heads, drawn.queries(), drawn.keys())
    if kind == "emphasise":
        return EmphasiseScores(heads, drawn.queries(), drawn.keys(), drawn.among(0.7, -0.3))
    if kind == "mask":
        return MaskScores(heads, lambda b, h, i, j: (i + 2 * j + b + h) % 4 != 1)
    shape = (batch, drawn.shape.keys)
    return BiasKeys(
        heads, drawn.normal(*(shape if drawn.among(False, True) else (batch, drawn.shape.heads, shape[1])))
    )


def weight_edit(
    drawn: Drawn,
    rule: ScoreRule,
    kinds: tuple[str, ...] = ("rescale", "scale", "mix", "identity", "pattern", "pattern"),
) -> WeightEdit:
    kind = drawn.among(*kinds)
    if kind == "mix":
        return mixture(drawn)
    heads, rows = drawn.heads(), drawn.rows()
    if kind == "identity":
        return MixIdentity(heads, drawn.among(0.3, 1.0), rows)
    if kind == "scale":
        return ScaleKeys(heads, drawn.keys(), drawn.among(0.0, 1.7, -0.5), rows)
    if kind == "pattern":
        return MixPattern(heads, drawn.among(0.3, 1.0), pattern(drawn, rule.mask), rows)
    keys = drawn.keys()
    condition = None
    if drawn.among(False, True):
        # bounds that no count of keys over another hits exactly
        condition = RowCondition(
            drawn.keys(), drawn.keys(0.7), drawn.among(0.37, 0.83), drawn.among(0.0, 0.23)
        )
    return Rescale(heads, keys, drawn.keys() & ~keys, drawn.among(0.0, 0.4, 0.9), rows, condition)


def pattern(drawn: Drawn, mask: Mask) -> patterns.Pattern:
    batch, heads = drawn.shape[:2]
    kind = drawn.among("uniform", "offset", "keys", "matching", "fixed", "map")
    if kind == "uniform":
        return patterns.Uniform()
    if kind == "offset":
        return patterns.Offset(drawn.among(0, 1, 4, -2))
    if kind == "keys":
        return patterns.OnKeys(drawn.keys())
    longest = max(mask.queries + mask.query_offset, mask.keys + mask.key_offset)
    if kind == "matching":
        length = max(longest - drawn.among(0, 2), 1)
        return patterns.Matching(torch.randint(0, 3, (drawn.batches(), length), generator=drawn.generator))
    if kind == "fixed":
        size = (max(longest - drawn.among(0, 3), 1), longest + drawn.among(0, 2))
        given = torch.rand(drawn.batches(), drawn.among(1, heads), *size, generator=drawn.generator)
        return patterns.Fixed(given * drawn.some(*given.shape, share=0.3))
    # another run of the same model, longer or shorter, its queries from position 0 on
    length = max(longest - drawn.among(0, 4), 1)
    q, k = (drawn.normal(batch, heads, length, 4).double() for _ in range(2))
    valid = torch.arange(length)[None] >= drawn.among(0, 1)
    other = Mask(length, length, right=0, valid_keys=valid, valid_queries=valid)
    return patterns.OfMap(attend(q, k, k, ScoreRule(0.7, other, sinks=drawn.normal(heads)))[1])


def of_rows(item: Any, rows: Tensor) -> Any:
    """A case, or any part of one, for the batch rows `rows` alone."""
    if isinstance(item, Tensor):
        return item if item.dim() < 2 or len(item) == 1 else item[rows]
    if isinstance(item, tuple):
        return tuple(of_rows(part, rows) for part in item)
    if dataclasses.is_dataclass(item) and not isinstance(item, type):
        fields = {field.name: getattr(item, field.name) for field in dataclasses.fields(item)}
        return replace(
            item, **{name: of_rows(part, rows) for name, part in fields.items() if name != "groups"}
        )
    if callable(item):
        return lambda b, h, i, j: item(rows[b], h, i, j)
    return item
