"""`Record`: the result of one recorded run: tokens, one `AttentionMap` per layer, exact statistics, provenance.

The axis order is always [batch, layer, head, query, key], without the axes that a tensor does not have. Heads are query
heads. `valid` is False on padding, which no statistic counts.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Bool, Float
from torch import Tensor

from headwater.kernels.maps import statistics as kernel
from headwater.kernels.maps.attention_map import AttentionMap
from headwater.kernels.notebook import table
from headwater.lens.errors import HeadError, RecordError, nearest
from headwater.lens.files import as_path
from headwater.lens.mixers.effective_map import EffectiveMap
from headwater.lens.models.stack import Mixer
from headwater.lens.naming.grids import coordinates
from headwater.lens.records import save_open
from headwater.lens.records.contents import Contents
from headwater.lens.records.graph import without_graph
from headwater.lens.records.provenance import as_attributes

DEFAULT_STATISTICS = kernel.DEFAULT
PROMPTS, WORDS = 3, 24  # what a notebook shows of them
FIGURES = "headwater.dashboard.figures.figure"  # the module that draws a record


@dataclass(frozen=True, eq=False)
class Record(Contents):
    """One recorded run. `Contents` lists the fields; the methods give maps, windows of weights and statistics.

    With `grad=True` all tensors keep their graph, and `output` is what the model gave in the same run, as transformers
    has it (`record.output.logits`), else None. `detach()` gives the record without the graph: analyses and figures
    read that, and it alone can be saved, pickled or copied deeply.

    >>> import headwater as hw
    >>> record = hw.load("tasks-4l").record("When Mary and John went to the store")
    >>> record.strings[0][:3], record.layers, record.n_heads
    (['<bos>', 'When', 'Mary'], [0, 1, 2, 3], 8)
    >>> record.statistic("entropy").dims
    ('batch', 'layer', 'head', 'query')
    >>> record.map(0).shape, record.pattern(0, head=3, queries=-1).shape
    ((1, 8, 9, 9), torch.Size([1, 1, 9]))
    """

    parts: dict[str, Record] = field(default_factory=dict)
    output: Any = None

    def __repr__(self) -> str:
        batch, length = self.tokens.shape
        size = f"{batch} × {length} tokens, {len(self.layers)} layers × {self.n_heads} heads"
        return f"Record({self.provenance.get('model')!r}, {size})"

    def _repr_html_(self) -> str:
        kept = {
            "maps": self.maps,
            "values": self.values,
            "residual stream": self.residuals,
            "mixers": self.effective,
        }
        told = as_attributes(self.provenance)
        facts = {
            **{f"prompt {row}": self._words(row) for row in range(min(PROMPTS, len(self.strings)))},
            "prompts": len(self.strings) if len(self.strings) > PROMPTS else None,
            "layers": ", ".join(map(str, self.layers)), "other parts": ", ".join(self.parts),
            "kept": ", ".join(name for name, content in kept.items() if content),
            "statistics": ", ".join(self.statistics), "groups": ", ".join(self.groups),
            "edits": ", ".join(str(each.get("edit")) for each in told.get("edits", ())),
            "first token": told.get("first_token"), "not covered": told.get("not_covered"),
        }  # fmt: skip
        return table(repr(self), facts)

    def _words(self, row: int) -> str:
        """The first tokens of a prompt, apart."""
        words = [
            word for word, real in zip(self.strings[row], self.valid[row].tolist(), strict=False) if real
        ]
        more = f" … ({len(words)} tokens)" if len(words) > WORDS else ""
        return " | ".join(words[:WORDS]) + more

    def part(self, name: str) -> Record:
        """The record of another part of the model, from the same run."""
        if not isinstance(name, str) or name not in self.parts:
            raise RecordError(f"the record has no part {name!r}: {nearest(name, self.parts)}")
        return self.parts[name]

    @property
    def mixers(self) -> tuple[Mixer, ...]:
        """What mixed positions in this part of the model beside attention, and has no map here."""
        told = self.provenance.get("mixers", ())
        try:
            return tuple(Mixer(int(layer), str(path), str(name)) for layer, path, name in told)
        except (TypeError, ValueError):
            raise RecordError(
                f"the record's mixers should be [layer, path, class], got {str(told)[:80]}"
            ) from None

    def map(self, layer: int) -> AttentionMap:
        """The maps of one layer as an operator [batch, head, query, key]; RecordError if none were kept."""
        self._has_layer(layer)
        if layer not in self.maps:
            raise RecordError("the record holds statistics alone; record with keep=('qk',) to have its maps")
        return self.maps[layer]

    def effective_map(self, layer: int) -> EffectiveMap:
        """The exact map of a layer without softmax attention, recorded with keep="mixers"; else RecordError."""
        if _is_whole(layer) and layer in self.effective:
            return self.effective[layer]
        mixers = [mixer.layer for mixer in self.mixers]
        if layer in mixers and not self.effective:
            raise RecordError(
                "the record holds no mixers; record with keep=('qk', 'mixers') to have their maps"
            )
        raise HeadError(
            f"layer {layer} has no mixer; mixers are in layers {', '.join(map(str, mixers)) or 'none'}"
        )

    def residual(self, layer: int | str) -> Float[Tensor, "batch position d_model"]:
        """The residual stream at the input of a layer, or after the last block ("final"), [batch, position, d_model].

        RecordError unless it was recorded, with keep="residual".
        """
        if not self.residuals:
            raise RecordError(
                "the record holds no residual stream; record with keep=('qk', 'residual') to have it"
            )
        if not (_is_whole(layer) or isinstance(layer, str)) or layer not in self.residuals:
            raise HeadError(
                f"no residual stream of {layer!r}; the record has {', '.join(map(str, self.residuals))}"
            )
        return self.residuals[layer]

    def pattern(
        self, layer: int, head: int | None = None, queries: Any = None, keys: Any = None
    ) -> Float[Tensor, "batch query key"] | Float[Tensor, "batch head query key"]:
        """Exact dense weights of a window, float32: [batch, query, key] of one head, [batch, head, query, key] of all.

        `queries` and `keys` are slices or positions on the token axis, padding included (None: all). Rows of padding
        are zero. Memory is that of the window.
        """
        map = self.map(layer)
        if head is not None and not (_is_whole(head) and 0 <= head < map.shape[1]):
            raise HeadError(f"no such head: {layer}.{head}; layer {layer} has heads 0 to {map.shape[1] - 1}")
        rows, row_pick = _window(queries, map.shape[2], "queries")
        columns, column_pick = _window(keys, map.shape[3], "keys")
        tile = map.tile(rows, columns, None if head is None else [head])
        tile = tile[:, :, row_pick][:, :, :, column_pick]
        return tile if head is None else tile[:, 0]

    def statistic(self, name: str) -> xr.DataArray:
        """A statistic as a labelled array [batch, layer, head, query] or, per key, [batch, layer, head, key].

        "mass" is [batch, layer, head, group, query]. Units are in `attrs`, names in kernels/maps/statistics.py.
        A statistic that was not recorded is computed from the maps; RecordError if no maps were kept.
        """
        if not isinstance(name, str) or name not in kernel.NAMES:
            raise RecordError(f"unknown statistic {name!r}: {nearest(name, kernel.NAMES)}")
        if why := undefined(name, self.keys is not None, self.ordered):
            raise RecordError(f"{why}; take the record of another part, or another statistic")
        if name not in self.statistics:
            if name == "mass" and not self.groups:
                raise RecordError(
                    "the statistic 'mass' needs named groups of keys; record with groups={'name': positions}"
                )
            if not self.maps:
                raise RecordError(f"{name!r} was not recorded; it has {', '.join(self.statistics) or 'none'}")
            groups = stack(self.groups)
            layers = [self.map(layer).statistic(name, groups) for layer in self.layers]
            self.statistics[name] = torch.stack([x.cpu() for x in layers], 1)
        return self._labelled(name, self.statistics[name])

    def to_xarray(self) -> xr.Dataset:
        """All recorded statistics as one Dataset, with token and head coordinates and provenance in `attrs`."""
        data = {name: self.statistic(name) for name in self.statistics}
        tokens = xr.DataArray(self.tokens.numpy(), dims=("batch", "position"), name="tokens")
        valid = xr.DataArray(self.valid.numpy(), dims=("batch", "position"), name="valid")
        found = xr.Dataset({"tokens": tokens, "valid": valid})
        found = found.assign_coords(token=(("batch", "position"), np.array(self.strings, dtype=object)))
        # query and key arrays each have a coordinate `token` on their own axis; a Dataset can hold only one
        found = found.merge(xr.Dataset({n: a.drop_vars("token") for n, a in data.items()}))
        found.attrs.update(self._flat_provenance())
        return found

    def figure(
        self, layer: int | None = None, head: int | None = None, *, statistic: str | None = None, **more: Any
    ) -> Any:
        """The plotly figure of one head's exact map, of all heads' maps, or of a statistic (`headwater.figure`).

        `more` are `batch`, `title`, `tokens` and `image`. HeadwaterError where plotly is not installed.
        """
        # figures stand above records, so they are asked for by name, as a plug-in is, and only here
        draw = importlib.import_module(FIGURES).figure
        asked = {"layer": layer, "head": head, "statistic": statistic}
        return draw(self, **{name: value for name, value in asked.items() if value is not None}, **more)

    def detach(self) -> Record:
        """The record without the graph and the output that `grad=True` keeps; itself where it has none.

        The tensors are the same memory, as those of `Tensor.detach` are.
        """
        found = without_graph(self)
        return found if self.output is None else replace(found, output=None)

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file; it is renamed into place, so that an interrupted write leaves the old file.

        RecordError for a record with `grad=True`: no file holds a graph.
        """
        if self.detach() is not self:
            raise RecordError("no file holds the graph of a record with grad=True; save record.detach()")
        return save_open.save(self, as_path(path, RecordError))

    def __copy__(self) -> Record:
        return replace(self)

    def __getstate__(self) -> dict[str, Any]:
        """What `pickle` and `copy.deepcopy` take. RecordError for a record with `grad=True`."""
        if self.detach() is not self:
            raise RecordError(
                "the graph of a record with grad=True can not be copied or pickled; give record.detach()"
            )
        return vars(self)

    @staticmethod
    def open(path: str | Path, verify: bool = False) -> Record:
        """Open a saved record. A file above 64 MiB is memory-mapped: its tensors are read when they are used.

        RecordError says why a file is not a record, and, at an access, that a mapped file was changed in place.
        `verify` reads every byte and compares digests.
        """
        return save_open.open_record(as_path(path, RecordError), Record, verify)

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
        axis = self.key_axis if last == "key" else self.query_axis
        coords["token"] = (("batch", last), np.array(axis.strings, dtype=object))
        columns = torch.arange(axis.valid.shape[1]).expand(axis.valid.shape)
        coords |= coordinates(axis.grids, last, columns, axis.valid.shape[1])
        meaning = {**kernel.ROW, **kernel.COLUMN, **kernel.GROUPED}[name]
        unit = {
            "lse": "nats", "entropy": "nats", "distance": "tokens", "distance_squared": "tokens²",
            "windowed_distance": "tokens", "visible": "queries", "argmax": "position",
        }  # fmt: skip
        attrs = {"long_name": meaning, "unit": unit.get(name, "1"), **self._flat_provenance()}
        return xr.DataArray(values.detach().numpy(), dims=dims, coords=coords, name=name, attrs=attrs)

    def _flat_provenance(self) -> dict[str, Any]:
        return {
            key: value if isinstance(value, str | int | float) else str(value)
            for key, value in as_attributes(self.provenance).items()
        }


def undefined(statistic: str, crosses: bool, ordered: bool) -> str:
    """Why a statistic has no meaning on an axis; "" where it has one. `ordered` as in `Contents`."""
    if crosses and statistic in kernel.RELATIVE:
        return f"{statistic!r} is not defined in cross-attention: no key is the query's own position"
    if not ordered and statistic in kernel.RELATIVE and statistic != "self":
        return (
            f"{statistic!r} counts places in the order of the tokens, which says nothing of where patches of a picture "
            "or learned queries stand; analyses.patch_distance counts patches"
        )
    return ""


def stack(groups: dict[str, Bool[Tensor, "batch position"]]) -> Bool[Tensor, "batch group position"] | None:
    return torch.stack(list(groups.values()), 1) if groups else None


def _is_whole(given: Any) -> bool:
    """Whether it is a whole number, of Python, numpy or torch; True and False are none."""
    if isinstance(given, Tensor):
        return given.dim() == 0 and not (
            given.is_floating_point() or given.is_complex() or given.dtype == torch.bool
        )
    return isinstance(given, int | np.integer) and not isinstance(given, bool)


def _window(given: Any, length: int, what: str) -> tuple[slice, Any]:
    """The smallest slice without a step that covers the positions, and the index of the positions in that slice."""
    if given is None:
        return slice(0, length), slice(None)
    numbers: list[Any] = [None]
    try:
        if isinstance(given, slice):
            numbers = list(range(*given.indices(length)))
        else:
            numbers = [given] if _is_whole(given) else list(given)
    except (TypeError, ValueError):  # no list, or no slice of whole numbers
        pass
    if not all(map(_is_whole, numbers)):
        raise RecordError(f"{what} are whole numbers, a list or a slice of them; got {given!r:.60}")
    if not isinstance(given, slice):
        wrong = [n for n in numbers if not -length <= n < length]
        if wrong:
            raise RecordError(
                f"{what}: no position {wrong[0]} in {length} tokens; positions go from {-length} to {length - 1}"
            )
        numbers = [int(n) % length for n in numbers]
    if not numbers:
        return slice(0, 0), slice(None)
    first = min(numbers)
    return slice(first, max(numbers) + 1), [n - first for n in numbers]
