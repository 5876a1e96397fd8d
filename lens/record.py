"""`Record`: what one run left behind — tokens, one `AttentionMap` per layer, exact statistics, and where it is from.

Padding is marked by `valid` and excluded everywhere. Axis order is [batch, layer, head, query, key], absent axes left
out; heads are query heads.
"""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import transformers
import xarray as xr
from torch import Tensor

from headwater.kernels import statistics as kernel
from headwater.kernels.operator import AttentionMap
from headwater.lens import positions
from headwater.lens.errors import HeadError, RecordError, nearest
from headwater.lens.heads import Head, Layers, chosen_layers
from headwater.lens.tokens import Tokens

if TYPE_CHECKING:
    from headwater.lens.model import HookedModel

DEFAULT_STATISTICS = tuple(name for name in kernel.NAMES if name not in ("mass", "sink"))
KEEP = ((), ("qk",), ("qkv",))
VERSION = version("headwater")


@dataclass(frozen=True, eq=False)
class Record:
    """`tokens` int64 and `valid` bool are [batch, position]; `strings` are the tokens as text, per batch row.

    `statistics` are tensors with the layer at axis 1; `maps` is empty where only statistics were kept.
    """

    tokens: Tensor
    valid: Tensor
    strings: list[list[str]]
    layers: list[int]
    n_heads: int
    causal: bool
    statistics: dict[str, Tensor]
    maps: dict[int, AttentionMap]
    values: dict[int, Tensor]
    groups: dict[str, Tensor]
    provenance: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        batch, length = self.tokens.shape
        size = f"{batch} × {length} tokens, {len(self.layers)} layers × {self.n_heads} heads"
        return f"Record({self.provenance.get('model')!r}, {size})"

    def map(self, layer: int) -> AttentionMap:
        """The attention maps of one layer, as an operator."""
        self._has_layer(layer)
        if layer not in self.maps:
            raise RecordError("the record holds statistics alone; record with keep=('qk',) to have its maps")
        return self.maps[layer]

    def pattern(self, layer: int, head: int | None = None, queries: Any = None, keys: Any = None) -> Tensor:
        """Exact weights of a window, dense float32: [batch, query, key] of one head, [batch, head, query, key] of all.

        `queries` and `keys` are slices or positions of the token axis (None: all). Rows of padding are zero.
        """
        map = self.map(layer)
        if head is not None and not 0 <= head < self.n_heads:
            raise HeadError(f"no such head: {layer}.{head}; layer {layer} has heads 0 to {self.n_heads - 1}")
        rows, row_pick = _window(queries, map.shape[2], "queries")
        columns, column_pick = _window(keys, map.shape[3], "keys")
        tile = map.tile(rows, columns, None if head is None else [head])
        tile = tile[:, :, row_pick][:, :, :, column_pick]
        return tile if head is None else tile[:, 0]

    def statistic(self, name: str) -> xr.DataArray:
        """[batch, layer, head, query], or key; `mass` [batch, layer, head, group, query]. Units are in `attrs`.

        One that was not recorded is computed from the maps, where they were kept.
        """
        if name not in kernel.NAMES:
            raise RecordError(f"unknown statistic {name!r}: {nearest(name, kernel.NAMES)}")
        if name not in self.statistics:
            if name == "mass" and not self.groups:
                raise RecordError(
                    "the statistic 'mass' needs named groups of keys; record with groups={'name': positions}"
                )
            if not self.maps:
                raise RecordError(f"{name!r} was not recorded; it has {', '.join(self.statistics) or 'none'}")
            groups = _stack(self.groups)
            layers = [self.map(layer).statistic(name, groups) for layer in self.layers]
            self.statistics[name] = torch.stack([x.cpu() for x in layers], 1)
        return self._labelled(name, self.statistics[name])

    def to_xarray(self) -> xr.Dataset:
        """All recorded statistics as one Dataset, with tokens, heads and provenance."""
        data = {name: self.statistic(name) for name in self.statistics}
        tokens = xr.DataArray(self.tokens.numpy(), dims=("batch", "position"), name="tokens")
        valid = xr.DataArray(self.valid.numpy(), dims=("batch", "position"), name="valid")
        found = xr.Dataset({"tokens": tokens, "valid": valid})
        found = found.assign_coords(token=(("batch", "position"), np.array(self.strings, dtype=object)))
        # the key and query axes carry the same tokens; one coordinate each keeps the arrays aligned by position alone
        found = found.merge(xr.Dataset({n: a.drop_vars("token") for n, a in data.items()}))
        found.attrs.update(self._flat_provenance())
        return found

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file, beside and renamed, so that a broken write leaves the old file."""
        from headwater.lens import storage

        return storage.save(self, Path(path))

    @staticmethod
    def open(path: str | Path) -> Record:
        """Open a saved record, memory-mapped; anything that is not one is refused with the reason."""
        from headwater.lens import storage

        return storage.open_record(Path(path))

    def _has_layer(self, layer: int) -> None:
        if layer not in self.layers:
            raise HeadError(
                f"layer {layer} is not in the record; it has layers {', '.join(map(str, self.layers))}"
            )

    def _labelled(self, name: str, values: Tensor) -> xr.DataArray:
        last = "key" if name in kernel.COLUMN else "query"
        dims = ("batch", "layer", "head", *(("group",) if name == "mass" else ()), last)
        coords: dict[str, Any] = {"layer": self.layers, "head": list(range(self.n_heads))}
        if name == "mass":
            coords["group"] = list(self.groups)
        coords["token"] = (("batch", last), np.array(self.strings, dtype=object))
        meaning = {**kernel.ROW, **kernel.COLUMN, **kernel.GROUPED}[name]
        unit = {
            "lse": "nats",
            "entropy": "nats",
            "distance": "tokens",
            "visible": "queries",
            "argmax": "position",
        }
        attrs = {"long_name": meaning, "unit": unit.get(name, "1"), **self._flat_provenance()}
        return xr.DataArray(values.numpy(), dims=dims, coords=coords, name=name, attrs=attrs)

    def _flat_provenance(self) -> dict[str, Any]:
        return {
            key: value if isinstance(value, str | int | float) else str(value)
            for key, value in self.provenance.items()
        }


def provenance(model: HookedModel) -> dict[str, Any]:
    """Where numbers that come from `model` now are from: the model, the edits that are on, and the versions."""
    return {
        "model": model.name,
        "revision": model.revision,
        "edits": [edit.to_dict() for edit in model.edits],
        "dtype": str(model.dtype).removeprefix("torch."),
        "headwater": VERSION,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": platform.machine(),
    }


class Recorder:
    """Listener that turns each layer's attention into what the record keeps, as the model runs."""

    def __init__(
        self, model: HookedModel, tokens: Tokens, statistics: Iterable[str], layers: Layers, keep: Iterable[str],
        groups: Mapping[str, Any] | None,
    ) -> None:  # fmt: skip
        self.model = model.key
        self._source = model
        self.tokens = tokens
        self.statistics = (statistics,) if isinstance(statistics, str) else tuple(statistics)
        unknown = [name for name in self.statistics if name not in kernel.NAMES]
        if unknown:
            raise RecordError(f"unknown statistic {unknown[0]!r}: {nearest(unknown[0], kernel.NAMES)}")
        self.layers = sorted(set(chosen_layers(layers, model.layers)))
        if not self.layers:
            raise RecordError("no layer is chosen; use layers='all' or a list of layers")
        self.keep = (keep,) if isinstance(keep, str) else tuple(keep)
        if self.keep not in KEEP:
            raise RecordError(f"keep must be (), ('qk',) or ('qkv',); got {self.keep!r}")
        self.groups = {str(n): _positions(p, tokens) for n, p in (groups or {}).items()}
        if "mass" in self.statistics and not self.groups:
            raise RecordError("the statistic 'mass' needs groups={'name': positions}")
        self._found: dict[int, dict[str, Tensor]] = {}
        self._maps: dict[int, AttentionMap] = {}
        self._values: dict[int, Tensor] = {}

    def take(self, layer: int, map: AttentionMap, value: Tensor, output: Tensor) -> None:
        bad = map.lse.isnan()
        if bad.any():
            row, head, query = bad.nonzero()[0].tolist()
            raise RecordError(
                f"attention scores are NaN or infinite, first in head {Head(layer, head)} at batch {row}, position "
                f"{query}; the weights or the input hold values that overflow"
            )
        if layer not in self.layers:
            return
        self._found[layer] = map.statistics(self.statistics, _stack(self.groups))
        if self.keep:
            # the model's own tensors may be views of larger ones that would stay alive with them
            self._maps[layer] = AttentionMap(
                map.q.contiguous(), map.k.contiguous(), map.rule, map.lse, map.steps, map.backend
            )
        if "qkv" in self.keep:
            self._values[layer] = value.detach().contiguous()

    def finish(self) -> Record:
        missing = [layer for layer in self.layers if layer not in self._found]
        if missing:
            raise RecordError(
                f"layers {missing} did not call Headwater's attention; nothing was recorded of them"
            )
        model = self._source
        statistics = {
            n: torch.stack([self._found[layer][n] for layer in self.layers], 1) for n in self.statistics
        }
        ids, valid = self.tokens.ids.cpu(), self.tokens.mask.cpu()
        strings = [model.to_strings(row) for row in ids]
        return Record(
            ids, valid, strings, self.layers, model.n_heads, model.causal, statistics, self._maps, self._values,
            self.groups, provenance(model),
        )  # fmt: skip


def _positions(given: Any, tokens: Tokens) -> Tensor:
    """A named group of keys as bool [batch, position]."""
    named = positions.check(given, "groups")
    picked = torch.zeros_like(tokens.mask, device="cpu")
    for row, real in enumerate(tokens.mask.cpu()):
        columns = real.nonzero()[:, 0]
        picked[row, columns[positions.of_row(named, len(columns))]] = True
    return picked


def _stack(groups: dict[str, Tensor]) -> Tensor | None:
    return torch.stack(list(groups.values()), 1) if groups else None


def _window(given: Any, length: int, what: str) -> tuple[slice, Any]:
    """The plain slice that covers what was asked for, and how to pick it out of that slice."""
    if given is None:
        return slice(0, length), slice(None)
    if isinstance(given, slice):
        numbers = list(range(*given.indices(length)))
    else:
        numbers = [given] if isinstance(given, int) else [int(n) for n in given]
        wrong = [n for n in numbers if not -length <= n < length]
        if wrong:
            raise RecordError(f"{what}: no position {wrong[0]} in {length} tokens")
        numbers = [n % length for n in numbers]
    if not numbers:
        return slice(0, 0), slice(None)
    first = min(numbers)
    return slice(first, max(numbers) + 1), [n - first for n in numbers]
