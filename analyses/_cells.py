"""The cells that `patch` tries one by one: what each replaces, where it stands in a layer, and which can be left out.

Cells of one layer differ in one index alone, so they run as copies of the prompts, one replacement in each copy.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from headwater.analyses._pairs import Pairs
from headwater.analyses._swapping import Parts, Per, Swap, expanded, per_head
from headwater.lens.model import HookedModel

What = Literal[
    "head", "head_position", "residual", "mlp", "q", "k", "v", "pattern", "destination_source"
]  # fmt: skip
Instead = Literal["resample", "zero", "mean"]
Index = tuple[int, ...]
NAMES = {
    "head": "attn.hook_z", "head_position": "attn.hook_z", "residual": "hook_resid_pre", "mlp": "hook_mlp_out",
    "pattern": "attn.hook_pattern", "destination_source": "attn.hook_pattern",
}  # fmt: skip
ALL = slice(None)


@dataclass(frozen=True, eq=False)
class Cells:
    """`dims` of a cell's index, and the heads there are: query heads, or key–value heads where these are patched."""

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
            "head_position": ("head", "position"), "residual": ("position",), "mlp": ("position",),
            "destination_source": ("head", "query", "key"),
        }.get(what, (head,))  # fmt: skip
        return cls(what, dims, heads, expand, model.causal)

    def shape(self, length: int) -> Index:
        """The size of each of `dims` for prompts of this length."""
        return tuple(self.heads if "head" in dim else length for dim in self.dims)

    def indices(self, pairs: Pairs, instead: Instead) -> tuple[list[Index], list[Index]]:
        """Cells to run, and cells where nothing can change; keys behind the query of a causal model are neither.

        Before the first token that differs, both sides of a causal model hold the same numbers.
        """
        all_of = itertools.product(*(range(size) for size in self.shape(pairs.length)))
        real = [c for c in all_of if not (self.causal and self.what == "destination_source" and c[2] > c[1])]
        if not self.causal or instead != "resample" or "head" in self.dims[-1]:
            return real, []
        at = self.dims.index("query") if "query" in self.dims else len(self.dims) - 1
        return [c for c in real if c[at] >= pairs.first], [c for c in real if c[at] < pairs.first]

    def source(
        self, model: HookedModel, ids: Tensor, layers: list[int], instead: Instead
    ) -> dict[int, Tensor]:
        """What takes the cells' place, by layer: the other run's activations, their mean over pairs, or nothing."""
        if self.what in ("q", "k", "v"):
            swap = Swap(model, len(ids), parts=layers)
            swap.logits(ids, 0)
            kept = {layer: swap.seen[layer][self.what] for layer in layers}
            if self.expand:
                kept = {layer: expanded(tensor, self.heads) for layer, tensor in kept.items()}
        else:
            swap = Swap(model, len(ids), keep=[self.name(layer) for layer in layers])
            swap.logits(ids, 0)
            kept = {layer: swap.cache[self.name(layer)] for layer in layers}
        if instead == "zero":
            return {layer: torch.zeros_like(tensor) for layer, tensor in kept.items()}
        if instead == "mean":
            return {layer: tensor.mean(0, keepdim=True).expand_as(tensor) for layer, tensor in kept.items()}
        return kept

    def name(self, layer: int) -> str:
        return f"blocks.{layer}.{NAMES[self.what]}"

    def swap(self, model: HookedModel, layer: int, cells: list[Index], source: Tensor) -> Swap:
        """A run of one copy of the prompts per cell, with that cell replaced in it."""
        rows = len(cells) * len(source)

        def replaced(tensor: Tensor) -> Tensor:
            copies = tensor.clone().unflatten(0, (len(cells), len(source)))
            for copy, cell in zip(copies, cells, strict=True):
                copy[self._place(cell)] = source[self._place(cell)]
            return copies.flatten(0, 1)

        if self.what not in ("q", "k", "v"):
            return Swap(model, rows, forward={self.name(layer): lambda tensor, hook: replaced(tensor)})

        def parts(found: Parts) -> Parts:
            tensor = expanded(found[self.what], self.heads) if self.expand else found[self.what]
            other = {"k": "v", "v": "k"}.get(self.what)
            more = {other: expanded(found[other], self.heads)} if self.expand and other else {}
            return {**found, **more, self.what: replaced(tensor)}

        return Swap(model, rows, attention={layer: parts})

    def _place(self, cell: Index) -> tuple[slice | int, ...]:
        """Where a cell is in one copy of an activation: z [pair, position, head, d], the stream [pair, position, d],
        patterns [pair, head, query, key], q, k and v [pair, head, position, d]."""
        if self.what == "head":
            return (ALL, ALL, cell[0])
        if self.what == "head_position":
            return (ALL, cell[1], cell[0])
        return (ALL, *cell)
