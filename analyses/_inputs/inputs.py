"""The input tokens that a prediction is computed from: those of a part, or an encoder's beside a decoder's.

`Inputs` holds the examples, `Entering` one batch of them as vectors at their entrances (`entrances.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from headwater.analyses._inputs.entrances import Entrance, entering, entrance, run_from, sides_of
from headwater.analyses._prompts.examples import Batch, Examples, differentiable
from headwater.analyses._prompts.positions import Positions, position_coordinates
from headwater.analyses._prompts.texts import Texts
from headwater.lens.model import HookedModel
from headwater.lens.naming.grids import PLACES
from headwater.lens.naming.tokens import Tokens

PATCHES = tuple(f"key_{place}" for place in PLACES)  # coordinates that are -1 for a token that is no patch
Value = Callable[[Tensor, Tensor], Tensor]  # (outputs, texts) → one number per row


@dataclass(frozen=True, eq=False)
class Entering:
    """The vectors of a batch, `vectors[side]` [text, token, feature], at the entrance of each side."""

    model: HookedModel
    batch: Batch
    where: list[Entrance]
    vectors: list[Tensor]

    def outputs(self, texts: Tensor, vectors: Sequence[Tensor]) -> Tensor:
        """What the model gives for rows of `vectors`; row n is a variant of text `texts[n]` of the batch."""
        changes = [lambda _, rows=rows: rows for rows in vectors]
        grad = any(rows.requires_grad for rows in vectors)
        return run_from(self.model, self.batch.rows(texts), self.where, changes, grad)

    def slopes(
        self, value: Value, texts: Tensor | None = None, vectors: Sequence[Tensor] | None = None
    ) -> list[Tensor]:
        """∂s/∂x of each side, [row, token, feature] in float64, at the batch's own vectors or at others."""
        texts = torch.arange(len(self.batch.places)) if texts is None else texts
        leaves = [rows.detach().requires_grad_() for rows in (self.vectors if vectors is None else vectors)]
        found = differentiable(value(self.outputs(texts, leaves), texts), "the measure")
        slopes = torch.autograd.grad(found.sum(), leaves, allow_unused=True)
        return [
            (torch.zeros_like(leaf) if slope is None else slope).double()
            for leaf, slope in zip(leaves, slopes, strict=True)
        ]


@dataclass(frozen=True, eq=False)
class Inputs:
    """Examples of a model with the tokens of each side; batches hold rows of equal lengths on all sides."""

    model: HookedModel
    sides: list[HookedModel]
    texts: list[Texts]
    _known: dict[Batch, list[Entrance]] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, model: HookedModel, examples: Examples, size: int, longest: int | None = None) -> Inputs:
        """The examples as tokens of every side that the prediction is computed from, as `Texts.of` reads them."""
        sides = sides_of(model)
        tokens = model.to_tokens(examples)
        return cls(model, sides, [Texts.of(side, tokens, size, longest) for side in sides])

    @property
    def batches(self) -> list[Batch]:
        return self.texts[-1].batches

    @property
    def valid(self) -> Tensor:
        """Which tokens are real, bool [batch, key], the sides one after the other."""
        return torch.cat([texts.valid for texts in self.texts], 1)

    @cached_property
    def entered(self) -> Tensor:
        """Which keys are tokens that an input gives, bool [batch, key]: no padding, no class or register tokens."""
        found = self.empty()
        for batch in self.batches:
            ones = [torch.ones(len(batch.places), int(each.places.sum())) for each in self.entrances(batch)]
            self.spread(batch, ones, found)
        return torch.cat(found, 1) == 1

    def enter(self, batch: Batch) -> Entering:
        """One batch as vectors."""
        where = self.entrances(batch)
        return Entering(self.model, batch, where, entering(self.model, batch.ids, where))

    def entrances(self, batch: Batch) -> list[Entrance]:
        """Where the tokens of each side enter."""
        if batch not in self._known:
            self._known[batch] = self._entrances(batch)
        return self._known[batch]

    def _entrances(self, batch: Batch) -> list[Entrance]:
        given = batch.ids
        if not isinstance(given, Tokens):
            given = Tokens(given, torch.ones_like(given, dtype=torch.bool))
        return [entrance(side, given) for side in self.sides]

    def empty(self) -> list[Tensor]:
        """NaN [batch, position] for each side, to be filled by `spread`."""
        return [texts.empty() for texts in self.texts]

    def spread(self, batch: Batch, values: Sequence[Tensor], into: Sequence[Tensor]) -> None:
        """Write values [text, token] of each side into the columns of `into`; tokens that no input gives stay NaN."""
        for texts, each, found, rows in zip(self.texts, self.entrances(batch), values, into, strict=True):
            every = torch.full((len(found), len(each.places)), torch.nan, dtype=torch.float64)
            every[:, each.places] = found.double().cpu()
            texts.spread(batch, every, rows)

    def by_key(self, values: Sequence[Tensor], name: str) -> xr.DataArray:
        """Values [batch, key] with the tokens; with several sides the coordinate `key_part` names each key's."""
        return self._joined(
            [texts.by_key(rows, name) for texts, rows in zip(self.texts, values, strict=True)]
        )

    def by_query(
        self, values: Sequence[Tensor], queries: Positions, columns: Tensor, name: str
    ) -> xr.DataArray:
        """Values [batch, query, key] of each side's keys for queries of the last side, as `by_key` joins them."""
        of_texts = position_coordinates(self.texts[-1], queries, columns)
        coordinates = {name: values for name, values in of_texts.items() if not name.startswith("key")}
        found = [texts.by_key(rows[:, 0], name) for texts, rows in zip(self.texts, values, strict=True)]
        joined = self._joined(found).coords
        return xr.DataArray(
            torch.cat(list(values), -1).numpy(), dims=("batch", "query", "key"), coords={**coordinates, **joined},
            name=name,
        )  # fmt: skip

    def _joined(self, found: Sequence[xr.DataArray]) -> xr.DataArray:
        if len(found) == 1:
            return found[0]
        parts = [
            np.full(rows.sizes["key"], side.part_name) for side, rows in zip(self.sides, found, strict=True)
        ]
        patches = [name for rows in found for name in map(str, rows.coords) if name in PATCHES]
        sides = []
        for rows in found:
            none = (("batch", "key"), np.full(rows.shape, -1))
            sides.append(
                rows.drop_vars("key").assign_coords({n: none for n in patches if n not in rows.coords})
            )
        joined = xr.concat(sides, "key")
        return joined.assign_coords(
            key=np.arange(joined.sizes["key"]), key_part=("key", np.concatenate(parts))
        )
