"""Examples that a model runs on, in batches of equal length, and the places of their tokens in one padded result.

There is no padding in a run, so an example gives the same values in a batch as alone. `Texts` has the padded columns of
a record of the same examples, and `spread` writes the values of a batch into them. The tokens are those of the model's
part: patches of a tower of images, the encoder's tokens on the keys of cross-attention.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from headwater.analyses._prompts.examples import Batch, Examples, batches_of, keys_of, queries_of
from headwater.analyses._prompts.positions import (
    Positions,
    columns_of,
    patch_coordinates,
    position_coordinates,
)
from headwater.lens.errors import AnalysisError
from headwater.lens.model import HookedModel
from headwater.lens.naming.grids import Grids
from headwater.lens.naming.tokens import Tokens
from headwater.lens.records.contents import Axis
from headwater.lens.records.labels import labels

Pull = Callable[[Tensor], Tensor]  # rows [text, asked, token] over a layer's outputs → over its inputs


@dataclass(frozen=True, eq=False)
class Texts:
    """`valid` bool [batch, position], `strings` and `grids` of the tokens that look, `keys` those that are looked at,
    which differ in cross-attention alone; `batches` are the examples in groups of equal length. `grids` are the
    pictures whose patches the tokens are."""

    valid: Tensor
    strings: list[list[str]]
    keys: Axis
    batches: list[Batch]
    grids: Grids = ()

    @classmethod
    def of(cls, model: HookedModel, examples: Examples, size: int, longest: int | None = None) -> Texts:
        """The examples as tokens of the model's part. AnalysisError if one has more than `longest` tokens."""
        tokens = model.to_tokens(examples)
        batches = batches_of(model, tokens, size)
        part = model.parts[model.part_name]
        queries = _axis(model, part.queries, tokens, queries_of(model, tokens))
        keys = _axis(model, part.keys, tokens, keys_of(model, tokens)) if part.crosses else queries
        count = int(max(queries.valid.sum(1).max(), keys.valid.sum(1).max()))
        if longest is not None and count > longest:
            raise AnalysisError(f"an example has {count} tokens and this takes {longest} at most; shorten it")
        return cls(queries.valid, queries.strings, keys, batches, queries.grids)

    def length(self, batch: Batch) -> int:
        """The number of tokens of each text of a batch, on the axis of those that look."""
        return int(self.valid[batch.places[0]].sum())

    def empty(self, *shape: int) -> Tensor:
        """NaN [batch, *shape, key] in float64, to be filled by `spread`."""
        return torch.full((*self.keys.valid.shape[:1], *shape, self.keys.valid.shape[1]), torch.nan).double()

    def spread(self, batch: Batch, values: Tensor, into: Tensor) -> None:
        """Write `values` [text, …, key] of a batch into the padded columns of `into` [batch, …, key]."""
        for place, row in zip(batch.places, values.double().cpu(), strict=True):
            into[place][..., self.keys.valid[place]] = row

    def columns(self, queries: Positions) -> Tensor:
        """Padded column of each asked query, [batch, asked]."""
        return columns_of(queries, self.valid, "queries")

    def rows(self, batch: Batch, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Token index of each asked column in the texts of a batch, and whether it is a real token: [text, asked]."""
        mine = columns[batch.places]
        rank = (self.valid[batch.places].cumsum(1) - 1).clamp_min(0)
        return rank.gather(1, mine), self.valid[batch.places].gather(1, mine)

    def by_query(self, values: Tensor, queries: Positions, columns: Tensor, name: str) -> xr.DataArray:
        """Values [batch, query, key] with positions and tokens."""
        coordinates = position_coordinates(self, queries, columns, key_texts=self.keys)
        return xr.DataArray(values.numpy(), dims=("batch", "query", "key"), coords=coordinates, name=name)

    def rows_down(
        self, queries: Positions, layers: Callable[[Batch], Iterable[Pull]], name: str
    ) -> xr.DataArray:
        """Rows of a product of maps [batch, query, key]: `layers(batch)` pull the asked rows, the last layer first."""
        columns = self.columns(queries)
        found = self.empty(columns.shape[1])
        for batch in self.batches:
            rows = indicators(*self.rows(batch, columns), self.length(batch))
            for pull in layers(batch):
                rows = pull(rows)
            self.spread(batch, rows, found)
        return self.by_query(found, queries, columns, name)

    def by_key(self, values: Tensor, name: str) -> xr.DataArray:
        """Values [batch, key] with the tokens."""
        coordinates = {
            **patch_coordinates(self.keys, "key", torch.arange(values.shape[1]).expand(len(values), -1)),
            "batch": np.arange(len(values)),
            "key": np.arange(values.shape[1]),
            "key_token": (("batch", "key"), np.array(self.keys.strings, dtype=object).astype(str)),
        }
        return xr.DataArray(values.numpy(), dims=("batch", "key"), coords=coordinates, name=name)


def _axis(model: HookedModel, name: str, tokens: Tokens, found: Tokens) -> Axis:
    part = model.parts[model.part_name]
    if len(found) != len(tokens):
        raise AnalysisError(
            f"{len(tokens)} examples have {len(found)} of {name} for the part {part.name!r} of {model.name}; give "
            "examples with one each"
        )
    told = labels(model, part, name, tokens, found)
    return Axis(found.ids.cpu(), found.mask.cpu(), told.strings, told.grids)


def indicators(rows: Tensor, real: Tensor, length: int) -> Tensor:
    """One-hot rows of the asked tokens, [text, asked, token] in float64; NaN where the query is padding."""
    found = torch.zeros(*rows.shape, length, dtype=torch.float64).scatter_(2, rows[..., None], 1.0)
    return found.masked_fill(~real[..., None], torch.nan)
