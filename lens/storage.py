"""Records on disk: one safetensors file, its meaning as JSON in the header; written beside, renamed, read by mapping.

A file is data from a stranger: nothing is executed, every name and shape in the header is checked against the tensors,
and anything unexpected is refused with the reason. A mask that only a function describes can not be written down.
"""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from headwater.kernels import edits as kernel
from headwater.kernels import statistics as statistics_kernel
from headwater.kernels.edits import WeightStep
from headwater.kernels.mask import Mask
from headwater.kernels.operator import AttentionMap
from headwater.kernels.rule import ScoreRule
from headwater.lens.errors import RecordError
from headwater.lens.record import Record

FORMAT = 1
EDITS = {c.__name__: c for c in (kernel.ScaleScores, kernel.BlockScores, kernel.Rescale, kernel.MixIdentity)}
LIMITS = {"layers": 10_000, "heads": 100_000}


def save(record: Record, path: Path) -> Path:
    """Write the record to `path`; an interrupted write leaves what was there."""
    tensors: dict[str, Tensor] = {"tokens": record.tokens, "valid": record.valid}
    tensors |= {f"statistic.{name}": value for name, value in record.statistics.items()}
    tensors |= {f"group.{i}": value for i, value in enumerate(record.groups.values())}
    tensors |= {f"value.{layer}": value for layer, value in record.values.items()}
    header = {
        "format": FORMAT,
        "layers": record.layers,
        "n_heads": record.n_heads,
        "causal": record.causal,
        "strings": record.strings,
        "groups": list(record.groups),
        "provenance": record.provenance,
        "maps": {str(layer): _pack_map(map, f"map.{layer}", tensors) for layer, map in record.maps.items()},
    }
    # two names of one storage are refused by safetensors; a mask is shared by all layers
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    if not path.parent.is_dir():
        raise RecordError(f"can not write {path}: the folder {path.parent} does not exist")
    if path.is_dir():
        raise RecordError(f"can not write {path}: it is a folder; give a file name")
    try:
        handle, beside = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
        os.close(handle)
        try:
            save_file(tensors, beside, metadata={"headwater": json.dumps(header)})
            with open(beside, "rb") as written:
                os.fsync(written.fileno())
            os.replace(beside, path)
        except BaseException:
            Path(beside).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise RecordError(f"can not write {path}: {error.strerror or error}") from None
    return path


def open_record(path: Path) -> Record:
    """Read a record by mapping the file; RecordError says what is wrong with one that is not."""
    if not path.is_file():
        raise RecordError(f"{path} is not a file" if path.exists() else f"there is no file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get("headwater")
            if text is None:
                raise RecordError(f"{path} is a safetensors file but not a Headwater record")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        header = json.loads(text)
        return _unpack(header, tensors)
    except SafetensorError as error:
        raise RecordError(
            f"{path} is not a readable record, it may be cut short: {str(error).splitlines()[0]}"
        ) from None
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        raise RecordError(f"{path} is not a well-formed record ({reason})") from None
    except OSError as error:
        raise RecordError(f"can not read {path}: {error.strerror or error}") from None


def _unpack(header: dict[str, Any], tensors: dict[str, Tensor]) -> Record:
    if header.get("format") != FORMAT:
        raise RecordError(
            f"the record has format {header.get('format')!r}, this Headwater reads {FORMAT}; record anew"
        )
    tokens, valid = tensors["tokens"], tensors["valid"]
    layers = [int(n) for n in header["layers"]]
    heads = int(header["n_heads"])
    if (
        tokens.dim() != 2
        or valid.shape != tokens.shape
        or valid.dtype != torch.bool
        or tokens.is_floating_point()
    ):
        raise ValueError(f"tokens {list(tokens.shape)} and valid {list(valid.shape)} do not belong together")
    strings = [[str(t) for t in row] for row in header["strings"]]
    if [len(row) for row in strings] != [tokens.shape[1]] * len(tokens):
        raise ValueError("as many token strings as tokens are needed")
    if not layers or not 0 < heads <= LIMITS["heads"] or len(layers) > LIMITS["layers"]:
        raise ValueError(f"{len(layers)} layers × {heads} heads")
    statistics = {n.removeprefix("statistic."): t for n, t in tensors.items() if n.startswith("statistic.")}
    for name, values in statistics.items():
        wanted = (len(tokens), len(layers), heads)
        if (
            name not in statistics_kernel.NAMES
            or values.shape[:3] != wanted
            or values.shape[-1] != tokens.shape[1]
        ):
            raise ValueError(f"statistic {name!r} of shape {list(values.shape)} does not fit")
    groups = {str(name): tensors[f"group.{i}"] for i, name in enumerate(header["groups"])}
    maps = {}
    for key, packed in header["maps"].items():
        map = maps[int(key)] = _unpack_map(packed, f"map.{int(key)}", tensors)
        if map.shape != (len(tokens), heads, tokens.shape[1], tokens.shape[1]) or int(key) not in layers:
            raise ValueError(f"the map of layer {key} has shape {list(map.shape)}")
    values = {int(n.removeprefix("value.")): t for n, t in tensors.items() if n.startswith("value.")}
    return Record(
        tokens, valid, strings, layers, heads, bool(header["causal"]), statistics, maps, values, groups,
        dict(header["provenance"]),
    )  # fmt: skip


def _pack_map(map: AttentionMap, name: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    rule = map.rule
    if rule.mask.extra is not None:
        raise RecordError(
            "this model's mask is given by a function and can not be written to a file; record with keep=() to save "
            "the statistics"
        )
    tensors |= {f"{name}.q": map.q, f"{name}.k": map.k, f"{name}.lse": map.lse}
    packed: dict[str, Any] = {"rule": _pack(rule, f"{name}.rule", tensors, skip=("mask", "edits"))}
    packed["mask"] = _pack(rule.mask, f"{name}.mask", tensors, skip=("extra",))
    packed["edits"] = [_pack(e, f"{name}.score.{i}", tensors) for i, e in enumerate(rule.edits)]
    packed["steps"] = []
    for i, step in enumerate(map.steps):
        packed["steps"].append(_pack(step.edit, f"{name}.step.{i}", tensors) | {"factors": len(step.factors)})
        tensors |= {f"{name}.step.{i}.factor.{j}": f for j, f in enumerate(step.factors)}
    return packed


def _unpack_map(packed: dict[str, Any], name: str, tensors: dict[str, Tensor]) -> AttentionMap:
    mask = Mask(**_unpack_fields(Mask, packed["mask"], f"{name}.mask", tensors))
    edits = tuple(_unpack_edit(e, f"{name}.score.{i}", tensors) for i, e in enumerate(packed["edits"]))
    fields = _unpack_fields(ScoreRule, packed["rule"], f"{name}.rule", tensors)
    rule = ScoreRule(**fields, mask=mask, edits=edits)
    steps = []
    for i, step in enumerate(packed["steps"]):
        factors = tuple(tensors[f"{name}.step.{i}.factor.{j}"] for j in range(int(step["factors"])))
        steps.append(WeightStep(_unpack_edit(step, f"{name}.step.{i}", tensors), factors))
    q, k, lse = (tensors[f"{name}.{part}"] for part in ("q", "k", "lse"))
    if (
        q.dim() != 4
        or k.dim() != 4
        or lse.shape != q.shape[:3]
        or q.shape[1] % k.shape[1]
        or q.shape[-1] != k.shape[-1]
    ):
        raise ValueError(f"queries {list(q.shape)} and keys {list(k.shape)} do not belong together")
    return AttentionMap(q, k, rule, lse, tuple(steps))


def _pack(item: Any, name: str, tensors: dict[str, Tensor], skip: tuple[str, ...] = ()) -> dict[str, Any]:
    """A dataclass as its plain fields; its tensors go to `tensors` and are named in the list "tensors"."""
    packed: dict[str, Any] = {"type": type(item).__name__, "tensors": []}
    for field in dataclasses.fields(item):
        value = getattr(item, field.name)
        if field.name in skip:
            continue
        if isinstance(value, Tensor):
            tensors[f"{name}.{field.name}"] = value
            packed["tensors"].append(field.name)
        else:
            packed[field.name] = value
    return packed


def _unpack_fields(
    kind: type, packed: dict[str, Any], name: str, tensors: dict[str, Tensor]
) -> dict[str, Any]:
    known = {field.name for field in dataclasses.fields(kind)}
    plain = {k: v for k, v in packed.items() if k not in ("type", "tensors", "factors")}
    wrong = (set(plain) | set(packed["tensors"])) - known
    if wrong or not all(v is None or isinstance(v, int | float) for v in plain.values()):
        raise ValueError(f"{kind.__name__} with {sorted(map(str, wrong)) or 'values that are no numbers'}")
    return plain | {field: tensors[f"{name}.{field}"] for field in packed["tensors"]}


def _unpack_edit(packed: dict[str, Any], name: str, tensors: dict[str, Tensor]) -> Any:
    kind = EDITS[packed["type"]]
    return kind(**_unpack_fields(kind, packed, name, tensors))
