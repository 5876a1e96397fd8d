"""Save and open records: one safetensors file with JSON metadata in its header.

Tensors: `tokens`, `valid`, `strings` (JSON as bytes), `grids` (rows of a batch row and a `Grid`), `group.N`,
`statistic.NAME.LAYER`, `map.LAYER.q|k|lse|rule…`, `value.LAYER`, `residual.LAYER`, `mixer.LAYER…`, and padding
`pad.N`. Names of the model's other parts begin with `part.N.`.
A record can be written while the model runs, layer by layer. A file may come from a stranger: opening it executes
nothing, checks every name, dtype and shape, and raises RecordError for anything unexpected.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from torch import Tensor

from headwater.kernels.maps import statistics as kernel
from headwater.kernels.maps.attention_map import AttentionMap
from headwater.lens.errors import RecordError, first_line, named_line
from headwater.lens.files import parse_json
from headwater.lens.naming.grids import Grid, Grids
from headwater.lens.records.contents import Axis, Contents
from headwater.lens.records.fit import refuse_misfit
from headwater.lens.records.open_file import OpenFile, watched
from headwater.lens.records.pack_maps import Add, Packer, unpack, unpack_effective
from headwater.lens.records.safetensors_file import RecordFile, read
from headwater.lens.records.stacked import Stacked

R = TypeVar("R", bound=Contents)
FORMAT = 2
MOST_WHOLE = 64 * 2**20  # bytes of a file that is read whole when it is opened
LIMITS = {"layers": 10_000, "heads": 100_000, "parts": 16}


class RecordWriter:
    """Writes one record, or one part of it, to a file: first the layers as they come, then what all layers share."""

    def __init__(self, add: Add, prefix: str = "") -> None:
        self._to, self._prefix = add, prefix
        self._packer = Packer(add)
        self._maps: dict[str, Any] = {}
        self._layers: dict[str, list[int]] = {"statistics": [], "values": []}
        self._names: list[str] = []
        self._residuals: list[str] = []

    def layer(
        self, layer: int, statistics: Mapping[str, Tensor], map: AttentionMap | None, value: Tensor | None
    ) -> None:
        """Write all that is kept of one layer."""
        self._names = list(statistics)
        self._layers["statistics"].append(layer)
        for name, values in statistics.items():
            self._add(f"statistic.{name}.{layer}", values)
        if map is not None:
            self._maps[str(layer)] = self._packer.pack(map, f"{self._prefix}map.{layer}")
        if value is not None:
            self._layers["values"].append(layer)
            self._add(f"value.{layer}", value)

    def residual(self, place: int | str, stream: Tensor) -> None:
        """Write the residual stream at the input of a layer, or after the last ("final")."""
        self._residuals.append(str(place))
        self._add(f"residual.{place}", stream)

    def about(self, record: Contents) -> dict[str, Any]:
        """Write the rest of the record and return its part of the header."""
        for name, axis in (("", record.query_axis), ("key.", record.keys)):
            if axis is not None:
                self._add(f"{name}tokens", axis.tokens)
                self._add(f"{name}valid", axis.valid)
                text = bytearray(json.dumps(axis.strings, separators=(",", ":")).encode())
                self._add(f"{name}strings", torch.frombuffer(text, dtype=torch.uint8))
                pictures = [[row, *grid] for row, grids in enumerate(axis.grids) for grid in grids]
                if pictures:
                    self._add(f"{name}grids", torch.tensor(pictures))
        for i, group in enumerate(record.groups.values()):
            self._add(f"group.{i}", group)
        effective = {
            str(layer): self._packer.pack(each, f"{self._prefix}mixer.{layer}")
            for layer, each in record.effective.items()
        }
        return {
            "layers": record.layers, "n_heads": record.n_heads, "causal": record.causal,
            "statistics": self._names, "values": self._layers["values"], "residuals": self._residuals,
            "groups": list(record.groups), "keys": record.keys is not None, "provenance": record.provenance,
            "maps": self._maps, "effective": effective, "prefix": self._prefix,
        }  # fmt: skip

    def _add(self, name: str, tensor: Tensor) -> None:
        self._to(self._prefix + name, tensor)


def save(record: Contents, path: Path) -> Path:
    """Write the record to `path`; an interrupted write leaves the old file."""
    tensors: list[tuple[str, Tensor]] = []
    header = _write(record, lambda *named: tensors.append(named))
    entries = sum(2 * len(name) + len(str(list(tensor.shape))) + 140 for name, tensor in tensors)
    with RecordFile(path, len(json.dumps(header)) * 6 // 5 + entries + 1000) as file:
        for name, tensor in tensors:
            file.add(name, tensor)
        return file.finish(header)


def joined(head: dict[str, Any], parts: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """The header of the file from the headers of its main part and of the other parts."""
    return {"format": FORMAT, **head, "parts": [{"name": name, **part} for name, part in parts.items()]}


def _write(record: Contents, add: Add) -> dict[str, Any]:
    parts = {name: _write_one(part, add, f"part.{i}.") for i, (name, part) in enumerate(record.parts.items())}
    return joined(_write_one(record, add, ""), parts)


def _write_one(record: Contents, add: Add, prefix: str) -> dict[str, Any]:
    writer = RecordWriter(add, prefix)
    for i, layer in enumerate(record.layers):
        if isinstance(record.statistics, Stacked):
            found = record.statistics.layer(i)
        else:
            found = {name: values[:, i] for name, values in record.statistics.items()}
        writer.layer(layer, found, record.maps.get(layer), record.values.get(layer))
    for place, stream in record.residuals.items():
        writer.residual(place, stream)
    return writer.about(record)


# --- reading


def open_record(path: Path, kind: type[R], verify: bool = False, most_whole: int = MOST_WHOLE) -> R:
    """Open a record as an instance of `kind`; `verify` compares the digest of every tensor.

    A file of at most `most_whole` bytes is read whole, a larger one memory-mapped. RecordError says where the latter
    was changed in place since, and why a file is not a record.
    """
    if not path.is_file():
        raise RecordError(f"{path} is not a file" if path.exists() else f"there is no file {path}")
    try:
        file = OpenFile.of(path)
        mapped = file.state[2] > most_whole
        header, tensors = read(path, verify, mapped)
        file = file if mapped else None
        if header.get("format") != FORMAT:
            raise RecordError(
                f"the record has format {header.get('format')!r}, this Headwater reads {FORMAT}; record anew"
            )
        left = dict(tensors)
        others = {}
        if len(header["parts"]) > LIMITS["parts"]:
            raise ValueError(f"{len(header['parts'])} parts")
        for part in header["parts"]:
            if not re.fullmatch(r"part\.\d{1,3}\.", part["prefix"]):
                raise ValueError(f"tensors of a part named {str(part['prefix'])[:40]!r}")
            others[str(part["name"])] = _record(part, _taken(left, part["prefix"]), {}, kind, file)
        return _record(header, left, others, kind, file)
    except SafetensorError as error:
        raise RecordError(
            f"{path} is not a readable record, it may be cut short: {first_line(error)}"
        ) from None
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RecursionError, RuntimeError, TypeError,
            ValueError) as error:  # fmt: skip
        raise RecordError(f"{path} is not a well-formed record ({named_line(error):.200})") from None
    except OSError as error:
        raise RecordError(f"can not read {path}: {error.strerror or error}") from None


def _taken(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Remove the tensors of one part from `tensors` and return them."""
    names = [name for name in tensors if name.startswith(prefix)]
    return {name: tensors.pop(name) for name in names}


def _record(
    header: dict[str, Any], tensors: dict[str, Tensor], parts: dict[str, R], kind: type[R], file: OpenFile | None
) -> R:  # fmt: skip
    prefix = header["prefix"]
    left = dict(tensors)

    def take(name: str) -> Tensor:
        return left.pop(prefix + name)

    def axis_of(name: str) -> Axis:
        tokens, valid, text = (take(f"{name}{each}") for each in ("tokens", "valid", "strings"))
        return _axis(tokens, valid, text, left.pop(f"{prefix}{name}grids", None))

    axis = axis_of("")
    keys = axis_of("key.") if header["keys"] else None
    layers, heads = [int(n) for n in header["layers"]], int(header["n_heads"])
    if not layers or len(set(layers)) != len(layers) or len(layers) > LIMITS["layers"] or min(layers) < 0:
        raise ValueError(f"layers {str(layers)[:60]}")
    if not 0 < heads <= LIMITS["heads"]:
        raise ValueError(f"{heads} heads")
    groups = {str(name): take(f"group.{i}").clone() for i, name in enumerate(header["groups"])}
    statistics = {}
    for name in header["statistics"]:
        if name not in kernel.NAMES:
            raise ValueError(f"unknown statistic {str(name)[:40]!r}")
        statistics[name] = [take(f"statistic.{name}.{layer}") for layer in layers]
    maps = {int(layer): unpack(packed, tensors) for layer, packed in header["maps"].items()}
    values = {int(layer): take(f"value.{int(layer)}") for layer in header["values"]}
    if beyond := (maps.keys() | values.keys()) - set(layers):
        raise ValueError(f"maps or values of layer {min(beyond)}, which is not in the record")
    residuals = {
        place if place == "final" else int(place): take(f"residual.{place}") for place in header["residuals"]
    }
    effective = {}
    for layer, packed in header.get("effective", {}).items():
        found = effective[int(layer)] = replace(
            unpack_effective(packed, tensors), provenance=dict(header["provenance"])
        )
        if found.layer != int(layer):
            raise ValueError(
                f"the effective map of layer {str(layer)[:20]} does not fit: it is of layer {found.layer}"
            )
    unknown = [name for name in left if not name.startswith((f"{prefix}map.", f"{prefix}mixer."))]
    if unknown:
        raise ValueError(f"unknown tensor {unknown[0][:60]!r}")
    found = kind(
        *axis[:3], layers, heads, bool(header["causal"]), Stacked(statistics, file), watched(maps, file),
        watched(values, file), groups, dict(header["provenance"]), keys=keys, parts=parts,
        residuals=watched(residuals, file), effective=watched(effective, file), grids=axis.grids,
    )  # fmt: skip
    refuse_misfit(found)
    return found


def _axis(tokens: Tensor, valid: Tensor, text: Tensor, pictures: Tensor | None) -> Axis:
    if tokens.dim() != 2 or tokens.dtype != torch.int64 or valid.dtype != torch.bool:
        raise ValueError(f"tokens {list(tokens.shape)} and valid {list(valid.shape)} do not belong together")
    strings = parse_json(bytes(text.numpy()).decode(), "the token strings", RecordError)
    words = [[str(word) for word in row] for row in strings]
    return Axis(tokens.clone(), valid.clone(), words, _grids(pictures, *tokens.shape))


def _grids(pictures: Tensor | None, batch: int, count: int) -> Grids:
    """The pictures of each row, from rows of a number and a grid."""
    if pictures is None:
        return ()
    if pictures.dtype != torch.int64 or pictures.dim() != 2 or pictures.shape[1] != 1 + len(Grid._fields):
        raise ValueError(f"pictures as {list(pictures.shape)}")
    found: list[list[Grid]] = [[] for _ in range(batch)]
    for row, *numbers in pictures.tolist():
        grid = Grid(*numbers)
        whole = grid.block == 1 or not (grid.rows % grid.block or grid.columns % grid.block)
        small = min(numbers[1:]) > 0 and max(numbers) <= count  # so that no product is large
        if not (
            0 <= row < batch
            and grid.start >= 0
            and grid.columns <= grid.step
            and small
            and grid.end <= count
            and whole
        ):
            raise ValueError(f"a picture {numbers} in row {row}, of {batch} × {count} tokens")
        found[row].append(grid)
    return tuple(map(tuple, found))
