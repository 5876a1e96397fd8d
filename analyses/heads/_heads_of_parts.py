"""The heads of one part of a model, or of several that are counted through together.

An encoder–decoder has three kinds of attention; Michel, Levy & Neubig 2019 prune the heads of each alone, and of all
together.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import xarray as xr

from headwater.lens.edits import ScaleHeads
from headwater.lens.errors import AnalysisError, nearest
from headwater.lens.model import HookedModel
from headwater.lens.naming.heads import every_head


@dataclass(frozen=True, eq=False)
class HeadsOfParts:
    """`views`: the model read as each part. Heads are numbered through the layers of the first part, then the next."""

    views: list[HookedModel]
    joined: bool  # whether results have an axis of parts

    @classmethod
    def of(cls, model: HookedModel, parts: str | Sequence[str] | None) -> HeadsOfParts:
        """The heads of the named parts, "encoder cross"; None: those of the part as which the model is read."""
        if parts is None:
            return cls([model], False)
        names = parts.replace(",", " ").split() if isinstance(parts, str) else list(parts)
        unknown = [name for name in names if name not in model.parts]
        if unknown or not names or len(set(names)) < len(names):
            told = nearest(unknown[0], model.parts) if unknown else "name each part once"
            raise AnalysisError(f"parts={parts!r} are no parts of {model.name}: {told}")
        return cls([model.part(name) for name in names], True)

    @property
    def names(self) -> list[str]:
        """ "2.0", or "cross 2.0" where there may be several parts."""
        return [
            f"{view.part_name} {head}" if self.joined else str(head)
            for view in self.views
            for head in every_head(view.layers, view.n_heads)
        ]

    def groups(self, by_head: bool) -> list[list[int]]:
        """The numbers of heads that go together: each head by itself, or those that share keys."""
        found, start = [], 0
        for view in self.views:
            for layer in view.layers:
                shape = view.shape(layer)
                size = 1 if by_head else shape.heads // shape.kv
                found += (np.arange(shape.heads) + start).reshape(-1, size).tolist()
                start += shape.heads
        return found

    def _by_view(self, heads: Sequence[int]) -> Iterator[tuple[HookedModel, torch.Tensor]]:
        """Each part, and which of its heads are among `heads`, bool [layer, head]."""
        gone = torch.zeros(len(self.names), dtype=torch.bool)
        gone[list(heads)] = True
        sizes = [view.n_layers * view.n_heads for view in self.views]
        for view, mine in zip(self.views, gone.split(sizes), strict=True):
            yield view, mine.view(view.n_layers, view.n_heads)

    @contextlib.contextmanager
    def without(self, heads: Sequence[int]) -> Iterator[None]:
        """These heads are scaled to zero, by an edit that is part of the model."""
        with contextlib.ExitStack() as stack:
            for view, gone in self._by_view(heads):
                named = [f"{view.layers[layer]}.{head}" for layer, head in gone.nonzero().tolist()]
                stack.enter_context(view.edit(ScaleHeads(dict.fromkeys(named, 0.0))))
            yield

    @contextlib.contextmanager
    def gated(self, heads: Sequence[int]) -> Iterator[None]:
        """The gates of these heads are 0, and 1 of all others."""
        with contextlib.ExitStack() as stack:
            for view, gone in self._by_view(heads):
                stack.enter_context(view.gated((~gone).float()[None]))
            yield

    def arrayed(self, values: np.ndarray, dims: tuple[str, ...] = ()) -> xr.DataArray:
        """Values [*dims, head] as [*dims, layer, head], or [*dims, part, layer, head] NaN where a part has less."""
        found, start = [], 0
        for view in self.views:
            size = view.n_layers * view.n_heads
            mine = values[..., start : start + size].reshape(*values.shape[:-1], view.n_layers, view.n_heads)
            coords = {"layer": view.layers, "head": np.arange(view.n_heads)}
            found.append(xr.DataArray(mine, dims=(*dims, "layer", "head"), coords=coords))
            start += size
        if not self.joined:
            return found[0]
        together = xr.concat(found, "part", join="outer").assign_coords(
            part=[v.part_name for v in self.views]
        )
        return together.transpose(*dims, "part", "layer", "head")
