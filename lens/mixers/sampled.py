"""Deformable attention of a run, each module as a map of the cells that it reads, held to what the module gave.

A query reads a few points of feature grids, and a point between cells is read from the four around it (Zhu et al.
2021, arXiv 2010.04159). transformers' modules hand the points and their weights to `MultiScaleDeformableAttention`, a
module of its own: a hook there takes them from the model's own run, so that no family's offsets are computed here.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Bool, Float
from torch import Tensor, nn

from headwater.kernels.mixers.sparse import SparseMap
from headwater.lens.attention import module_hooks
from headwater.lens.errors import HeadError, ModelError
from headwater.lens.mixers.kernel_calls import differing

SAMPLER = "MultiScaleDeformableAttention"  # of transformers, a class of this name in each family


@dataclass(frozen=True, eq=False)
class SampledMap:
    """One module of deformable attention as `map @ values`, exact.

    The keys are the cells of all `grids` (height, width), level after level and row by row. `values` are what the
    module projected there, 0 in cells of padding, which `valid` tells (None: none is). `output` is what it wrote. With
    `own_cells` the queries are the cells themselves (an encoder), otherwise object queries (a decoder). Points outside
    of a grid read 0, so the rows of the map may sum to less than 1. `path` and `name` are module and class.
    """

    path: str
    name: str
    map: SparseMap
    values: Float[Tensor, "batch head key c"]
    output: Float[Tensor, "batch query d_model"]
    grids: tuple[tuple[int, int], ...]
    own_cells: bool
    valid: Bool[Tensor, "batch key"] | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def keys(self) -> list[str]:
        """A name for each key: "level 1: 0,3" is row 0, column 3 of the second grid."""
        return [f"level {level}: {row},{column}" for level, row, column in self._cells().tolist()]

    @property
    def queries(self) -> list[str]:
        """A name for each query: that of its cell, or "query 3"."""
        return self.keys if self.own_cells else [f"query {i}" for i in range(self.map.shape[2])]

    def rows(self, queries: Sequence[int], batch: int = 0) -> xr.DataArray:
        """The weights of chosen queries on all keys, [head, query, key], with level, row and column of each key.

        `rows[..., rows.key_level == 1]` is one level, and `hw.on_grid` of that a picture. HeadError for a query or an
        example that there is not.
        """
        examples, _, count, _ = self.map.shape
        wrong = [i for i in queries if not 0 <= i < count]
        if wrong or not 0 <= batch < examples:
            raise HeadError(
                f"{self.path} has {count} queries in {examples} examples; got queries {list(queries)} of {batch}"
            )
        found = [self.map.tile(slice(i, i + 1), slice(None))[batch] for i in queries]
        empty = self.map.weights.new_zeros(self.map.shape[1], 0, self.map.keys)
        level, row, column = self._cells().T
        return xr.DataArray(
            torch.cat([empty, *found], 1).cpu().numpy(),
            {
                "query": list(queries), "query_token": ("query", [self.queries[i] for i in queries]),
                "key_token": ("key", self.keys), "key_level": ("key", level), "key_row": ("key", row),
                "key_column": ("key", column),
            },
            ("head", "query", "key"), "weight", {"module": self.path, **self.provenance},
        )  # fmt: skip

    def _cells(self) -> np.ndarray:
        """Level, row and column of each key, [key, 3]."""
        levels = [
            np.stack([np.full(high * wide, level), *np.indices((high, wide)).reshape(2, -1)], 1)
            for level, (high, wide) in enumerate(self.grids)
        ]
        return np.concatenate(levels)

    def __repr__(self) -> str:
        return f"SampledMap({self.map.shape}, grids {self.grids}, {self.name} at {self.path})"


def sampling(hf: nn.Module) -> dict[str, nn.Module]:
    """The modules of deformable attention, by path."""
    return {path: module for path, module in hf.named_modules() if hasattr(module, "sampling_offsets")}


def sampler(module: nn.Module) -> nn.Module | None:
    """The module inside that weighs the points; None for one that does so in a function of its own."""
    return next((child for child in module.children() if type(child).__name__ == SAMPLER), None)


@contextlib.contextmanager
def reading(model: str, hf: nn.Module, provenance: Mapping[str, Any]) -> Iterator[dict[str, SampledMap]]:
    """Inside, a run of the model fills the dict with the map of every module of deformable attention, by path.

    `map @ values` is held to what the module weighed, head by head: within 1e-4 of the largest number in float32, 4
    roundings of a coarser dtype. ModelError names a module that does not agree, that ran twice or not at all, or that
    does not call `MultiScaleDeformableAttention`; and a model without such modules.
    """
    modules = sampling(hf)
    if not modules:
        raise ModelError(
            f"{model} has no deformable attention; model.record(…) gives the maps of its attention"
        )
    inner: dict[nn.Module, str] = {}
    for path, module in modules.items():
        if (weighing := sampler(module)) is None:
            raise ModelError(
                f"{model}: {type(module).__name__} ({path}) has no map: it weighs its points in code of its own, "
                f"which is not read; modules that call {SAMPLER} are"
            )
        inner[weighing] = path
    weighed: dict[str, tuple[SparseMap, Tensor, tuple[tuple[int, int], ...]]] = {}
    found: dict[str, SampledMap] = {}

    def weigh(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        path = inner[module]
        if path in weighed:
            raise ModelError(f"{model}: {path} ran twice, so it has no single map; run once in one pass")
        given = inspect.signature(type(module).forward).bind(module, *args, **kwargs).arguments
        points, weights, values = (
            given[name].detach() for name in ("sampling_locations", "attention_weights", "value")
        )
        grids = tuple((int(high), int(wide)) for high, wide in given["value_spatial_shapes_list"])
        values = values.transpose(1, 2)
        map = SparseMap.of_samples(_full(points), _full(weights), grids)
        own = output.detach().unflatten(-1, (map.shape[1], -1)).transpose(1, 2)
        worst, rounding = differing(map @ values, own, (0, 2, 3), own.dtype)
        if not bool((worst <= rounding).all()):
            raise ModelError(
                f"{model}: {path} has no map: `map @ values` differs from what it weighed by {float(worst.max()):.1e}"
            )
        weighed[path] = map, values, grids

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        path = next(path for path, each in modules.items() if each is module)
        given = inspect.signature(type(module).forward).bind(module, *args, **kwargs).arguments
        map, values, grids = weighed[path]
        own_cells = given.get("encoder_hidden_states") is given["hidden_states"]
        found[path] = SampledMap(
            path, type(module).__name__, map, values, module_hooks.first_output(output).detach(), grids, own_cells,
            given.get("attention_mask"), provenance,
        )  # fmt: skip

    with module_hooks.on(inner, after=weigh), module_hooks.on(modules.values(), after=keep):
        yield found
    if silent := [path for path in modules if path not in found]:
        raise ModelError(f"{model}: {', '.join(silent)} did not run, so it has no map")


def _full(x: Tensor) -> Tensor:
    """In float32 at least."""
    return x if x.dtype == torch.float64 else x.float()
