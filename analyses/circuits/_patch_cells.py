"""The cells that `patch` replaces one by one: their indices, their place in an activation, and which need no run.

The cells of one layer run in one batch, as copies of the prompts with one replacement in each copy.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from headwater.analyses._prompts.examples import Examples
from headwater.analyses._prompts.pairs import PairExamples, Pairs, pairs_of, side_by_side
from headwater.analyses._runs.prompt_copies import Copies
from headwater.analyses._runs.replace_activations import Parts, Per, Swap, expanded, per_head
from headwater.lens.edits.heads import Ablation
from headwater.lens.errors import AnalysisError
from headwater.lens.model import HookedModel

What = Literal[
    "head", "head_position", "residual", "attention", "mlp", "q", "k", "v", "pattern", "destination_source"
]  # fmt: skip
Index = tuple[int, ...]
NAMES = {
    "head": "attn.hook_z", "head_position": "attn.hook_z", "residual": "hook_resid_pre",
    "attention": "hook_attn_out", "mlp": "hook_mlp_out", "pattern": "attn.hook_pattern",
    "destination_source": "attn.hook_pattern",
}  # fmt: skip
ALL = slice(None)


def groups_of(
    model: HookedModel, clean: Examples | PairExamples, corrupt: Examples | None, ablation: Ablation
) -> list[Pairs]:
    """The pairs in groups of one length. AnalysisError where `ablation="mean"` meets a group of one pair."""
    groups = pairs_of(model, side_by_side(model, clean, corrupt))
    if ablation == "mean" and any(len(pairs.places) < 2 for pairs in groups):
        raise AnalysisError("ablation='mean' needs two or more pairs of each length")
    return groups


def replacement(other: Tensor, ablation: Ablation) -> Tensor:
    """The replacement [pair, …] of an activation, given that of the other prompt."""
    if ablation == "zero":
        return torch.zeros_like(other)
    return other.mean(0, keepdim=True).expand_as(other) if ablation == "mean" else other


@dataclass(frozen=True, eq=False)
class Cells:
    """`dims` of a cell's index, and the number of heads: key–value heads where those are patched, else query heads."""

    what: What
    dims: tuple[str, ...]
    heads: int
    expand: bool
    causal: bool

    @classmethod
    def of(cls, model: HookedModel, what: What, per: Per | None) -> Cells:
        shared = what in ("k", "v") and not per_head(model, what, per)
        expand = what in ("k", "v") and not shared and model.n_heads != model.n_kv_heads
        if what == "q":
            per_head(model, what, per)
        heads = model.n_kv_heads if shared else model.n_heads
        head = "kv_head" if shared and heads != model.n_heads else "head"
        dims = {
            "head_position": ("head", "position"), "residual": ("position",), "attention": ("position",),
            "mlp": ("position",),            "destination_source": ("head", "query", "key"),
        }.get(what, (head,))  # fmt: skip
        return cls(what, dims, heads, expand, model.causal)

    def shape(self, axes: tuple[int, int]) -> Index:
        """The size of each of `dims` for so many queries and keys."""
        queries, keys = axes
        return tuple(self.heads if "head" in dim else keys if dim == "key" else queries for dim in self.dims)

    def indices(
        self, copies: Copies, axes: tuple[int, int], ablation: Ablation
    ) -> tuple[list[Index], list[Index]]:
        """Cells to run, sorted by position, and cells that cannot change the measure; weights on keys after the query
        of a causal model are in neither list.
        """
        all_of = itertools.product(*map(range, self.shape(axes)))
        real = [c for c in all_of if not (self.causal and self.what == "destination_source" and c[2] > c[1])]
        run = [c for c in real if self.start(c, copies, ablation) < copies.stop]
        run.sort(key=lambda cell: self.start(cell, copies, ablation))
        return run, sorted(set(real).difference(run))

    def start(self, cell: Index, copies: Copies, ablation: Ablation) -> int:
        """The first position of a run that this cell changes; `copies.stop` where it changes nothing.

        Before the first token that differs, both sides of a causal model hold the same numbers.
        """
        first = copies.first if ablation == "resample" else 0
        if self._at is None:
            return first
        return copies.stop if cell[self._at] < first else cell[self._at]

    @property
    def _at(self) -> int | None:
        """Which of `dims` is the position that changes."""
        return next((n for n, dim in enumerate(self.dims) if dim in ("position", "query")), None)

    def kept(self, layers: list[int]) -> dict[str, Any]:
        """The activations that a run must keep for `source`."""
        return {"parts": layers} if self.what in ("q", "k", "v") else {"keep": [self.name(n) for n in layers]}

    def source(self, seen: Swap, layer: int, ablation: Ablation) -> Tensor:
        """The replacement of the cells, from the other prompts' activations: the second half of the rows of `seen`."""
        both = seen.seen[layer][self.what] if self.what in ("q", "k", "v") else seen.cache[self.name(layer)]
        found = both[len(both) // 2 :]
        return replacement(expanded(found, self.heads) if self.expand else found, ablation)

    def name(self, layer: int) -> str:
        return f"blocks.{layer}.{NAMES[self.what]}"

    def by_cell(self, found: Tensor) -> Tensor:
        """Numbers of an activation, [pair, position] or [pair, position, head], in the order of a cell's index."""
        if self.what == "head":
            return found.sum(1)
        return found.mT if self.what == "head_position" else found

    def swap(self, model: HookedModel, layer: int, cells: list[Index], source: Tensor, window: slice) -> Swap:
        """A run over the positions of a window, with one copy of the prompts per cell and that cell replaced in it."""
        rows, within = len(cells) * len(source), self._within(source, window)
        places = [self._place(cell, window.start) for cell in cells]

        def replaced(tensor: Tensor) -> Tensor:
            copies = tensor.clone().unflatten(0, (len(cells), len(source)))
            for copy, place in zip(copies, places, strict=True):
                copy[place] = within[place]
            return copies.flatten(0, 1)

        if self.what not in ("q", "k", "v"):
            return Swap(model, rows, forward={self.name(layer): lambda tensor, hook: replaced(tensor)})

        def parts(found: Parts) -> Parts:
            tensor = expanded(found[self.what], self.heads) if self.expand else found[self.what]
            other = {"k": "v", "v": "k"}.get(self.what)
            more = {other: expanded(found[other], self.heads)} if self.expand and other else {}
            return {**found, **more, self.what: replaced(tensor)}

        return Swap(model, rows, attention={layer: parts})

    def _within(self, source: Tensor, window: slice) -> Tensor:
        """The part of `source` that a run over a window computes: keys and values start at the first position.

        z is [pair, position, head, d], the stream [pair, position, d], patterns [pair, head, query, key], q, k and v
        [pair, head, position, d].
        """
        keys = slice(window.stop if self.causal else None)
        if self.what in ("pattern", "destination_source"):
            return source[:, :, window, keys]
        if self.what in ("k", "v"):
            return source[:, :, keys]
        return source[:, :, window] if self.what == "q" else source[:, window]

    def _place(self, cell: Index, start: int) -> tuple[slice | int, ...]:
        """The index of a cell in one copy of the activation of a run from `start`."""
        if self.what == "head":
            return ALL, ALL, cell[0]
        if self.what == "head_position":
            return ALL, cell[1] - start, cell[0]
        if self.what in ("residual", "attention", "mlp"):
            return ALL, cell[0] - start
        return (
            (ALL, cell[0], cell[1] - start, cell[2]) if self.what == "destination_source" else (ALL, cell[0])
        )
