"""Texts that a model runs on, in batches of equal length, and their places in one padded result.

There is no padding in a run, so a text gives the same values in a batch as alone. `Texts` has the padded columns of a
record of the same texts, and `spread` writes the values of a batch into them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from headwater.analyses._prompts.examples import Batch, Examples, batches_of
from headwater.analyses._prompts.positions import Positions, columns_of, position_coordinates
from headwater.lens.errors import AnalysisError
from headwater.lens.model import HookedModel
from headwater.lens.naming.grids import Grids
from headwater.lens.records.labels import labels

Pull = Callable[[Tensor], Tensor]  # rows [text, asked, token] over a layer's outputs → over its inputs


@dataclass(frozen=True, eq=False)
class Texts:
    """`valid` bool [batch, position], `strings` the tokens as text, `batches` the texts in groups of equal length,
    `grids` the pictures whose patches the tokens are."""

    valid: Tensor
    strings: list[list[str]]
    batches: list[Batch]
    grids: Grids = ()

    @classmethod
    def of(
        cls, model: HookedModel, examples: Examples, size: int, longest: int | None = None, beside: bool = False
    ) -> Texts:  # fmt: skip
        """The examples as tokens of `model`. AnalysisError if one has more than `longest` tokens.

        With `beside` the examples may be images, or texts with images.
        """
        if model.part_name != "text" and not (
            beside and model.part_name == "vision" and len(model.parts) == 1
        ):
            raise AnalysisError(
                f"{model.name} is read as its {model.part_name}; this analysis takes models of one text"
            )
        if model.part_name == "text" and "vision" in model.parts and model.image_token is None:
            raise AnalysisError(
                f"{model.name} has towers of text and images that never attend to each other; this analysis takes "
                "models of one text"
            )
        batches = batches_of(model, examples, size, beside)
        tokens = model.to_tokens(examples)
        found = int(tokens.mask.sum(1).max())
        if longest is not None and found > longest:
            raise AnalysisError(f"a text has {found} tokens and this takes {longest} at most; shorten it")
        part = model.parts[model.part_name]
        told = labels(model, part, part.queries, tokens, tokens)
        return cls(tokens.mask.cpu(), told.strings, batches, told.grids)

    def empty(self, *shape: int) -> Tensor:
        """NaN [batch, *shape, position] in float64, to be filled by `spread`."""
        return torch.full((len(self.valid), *shape, self.valid.shape[1]), torch.nan, dtype=torch.float64)

    def spread(self, batch: Batch, values: Tensor, into: Tensor) -> None:
        """Write `values` [text, …, token] of a batch into the padded columns of `into` [batch, …, position]."""
        for place, row in zip(batch.places, values.double().cpu(), strict=True):
            into[place][..., self.valid[place]] = row

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
        coordinates = position_coordinates(self, queries, columns)
        return xr.DataArray(values.numpy(), dims=("batch", "query", "key"), coords=coordinates, name=name)

    def rows_down(
        self, queries: Positions, layers: Callable[[Batch], Iterable[Pull]], name: str
    ) -> xr.DataArray:
        """Rows of a product of maps [batch, query, key]: `layers(batch)` pull the asked rows, the last layer first."""
        columns = self.columns(queries)
        found = self.empty(columns.shape[1])
        for batch in self.batches:
            rows = indicators(*self.rows(batch, columns), batch.ids.shape[1])
            for pull in layers(batch):
                rows = pull(rows)
            self.spread(batch, rows, found)
        return self.by_query(found, queries, columns, name)

    def by_key(self, values: Tensor, name: str) -> xr.DataArray:
        """Values [batch, key] with the tokens."""
        coordinates = {
            "batch": np.arange(len(values)),
            "key": np.arange(values.shape[1]),
            "key_token": (("batch", "key"), np.array(self.strings, dtype=object).astype(str)),
        }
        return xr.DataArray(values.numpy(), dims=("batch", "key"), coords=coordinates, name=name)


def indicators(rows: Tensor, real: Tensor, length: int) -> Tensor:
    """One-hot rows of the asked tokens, [text, asked, token] in float64; NaN where the query is padding."""
    found = torch.zeros(*rows.shape, length, dtype=torch.float64).scatter_(2, rows[..., None], 1.0)
    return found.masked_fill(~real[..., None], torch.nan)
