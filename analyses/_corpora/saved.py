"""A corpus as one safetensors file: arrays of whole numbers, texts of examples; what was asked is in its header."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from headwater.analyses._corpora.state import ACTIVATION_BINS, ARRAYS, COUNTS, TOP, State
from headwater.analyses._corpora.statistics import BINS, DISTANCES, HEADVIS, NAMES
from headwater.lens.errors import RecordError
from headwater.lens.files import as_path
from headwater.lens.records.safetensors_file import META, RecordFile, read

FORMAT = 1
TABLES = (
    "given",
    "taken",
)  # tokens × heads; where most numbers are zero the others alone are kept, with their places
KEPT = ("kept_row", "kept_end", "kept_ids", "kept_kinds")
MOST = {"layers": 10_000, "heads": 100_000, "keep": 1_000, "table": 2**31}


def save(state: State, header: dict[str, Any], path: str | Path) -> Path:
    """Write a state and what is told about it, whole or not at all."""
    arrays = {name: _narrow(getattr(state, name)) for name in ARRAYS}
    for name in TABLES:
        if np.count_nonzero(arrays[name]) < arrays[name].size / 4:
            arrays[f"{name}_at"] = _narrow(np.flatnonzero(arrays[name]))
            arrays[name] = arrays[name][arrays[name] != 0]
    rows = sorted(state.kept)
    texts = [state.kept[row][1] for row in rows]
    arrays["kept_row"] = np.array(rows, np.int64)
    arrays["kept_end"] = np.cumsum([len(ids) for ids in texts], dtype=np.int64)
    # as places in the list of the tokens that occur, which takes half of the bytes
    arrays["kept_kinds"], places = np.unique(
        np.concatenate([np.zeros(0, np.int64), *texts]), return_inverse=True
    )
    arrays["kept_ids"] = _narrow(places)
    told = {"corpus": FORMAT, "told": state.told, "where": [state.kept[row][0] for row in rows]}
    with RecordFile(as_path(path, RecordError)) as file:
        for name, array in arrays.items():
            file.add(name, torch.from_numpy(np.ascontiguousarray(array)))
        return file.finish({**told, **header})


def _narrow(array: np.ndarray) -> np.ndarray:
    """Whole numbers in the smallest signed type that holds them all."""
    if array.dtype.kind != "i":
        return array
    least, most = array.min(initial=0), array.max(initial=0)
    kinds = (np.int8, np.int16, np.int32, np.int64)
    return array.astype(next(k for k in kinds if np.iinfo(k).min <= least and most <= np.iinfo(k).max))


def open_state(path: str | Path, verify: bool = False) -> tuple[State, dict[str, Any]]:
    """A saved state and its header; RecordError for a file that is none, or was changed."""
    given = as_path(path, RecordError)
    if not given.is_file():
        raise RecordError(f"there is no file {given}; give the result of headwater corpus")
    try:
        header, tensors = read(given, verify)
        if header.get("corpus") != FORMAT:
            raise RecordError(f"{given} is not the result of headwater corpus, or of another version of it")
        state = _state(header, {name: tensor.numpy() for name, tensor in tensors.items()})
        return state, {**header, "words": {int(token): word for token, word in header["words"].items()}}
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise RecordError(
            f"{given} is no corpus that can be read: {' '.join(str(error).split())[:120]}"
        ) from None


def is_corpus(path: Path) -> bool:
    """Whether the file says that it is a corpus; what is no safetensors file is none."""
    try:
        with safe_open(path, framework="np") as file:
            return '"corpus"' in (file.metadata() or {}).get(META, "")[:20]
    except (SafetensorError, OSError):
        return False


def _state(header: dict[str, Any], found: dict[str, np.ndarray]) -> State:
    _check_header(header)
    layers, heads = len(header["run"]["layers"]), header["run"]["heads"]
    keep = header["run"]["keep"]
    shapes = {"sums": (2, len(NAMES), layers, heads), "counts": (len(NAMES), layers, heads)}
    shapes |= {"bins": (len(NAMES), layers, heads, BINS), "distances": (layers, heads, len(DISTANCES) - 1)}
    shapes |= {"headvis": (2, len(HEADVIS), layers, heads)} | {
        name: (len(NAMES), layers, heads, keep) for name in TOP
    }
    table = (len(found["vocabulary"]), layers, heads)
    for name in TABLES:
        if f"{name}_at" in found:
            found[name] = _spread(found[name], found.pop(f"{name}_at"), table)
    shapes |= dict.fromkeys(TABLES, table) | {"sampled": (len(found["sample"]), layers, heads)}
    shapes |= {"activation": (layers, heads, ACTIVATION_BINS)}
    if set(found) != {*ARRAYS, *KEPT}:
        raise ValueError("it lacks arrays, or holds others")
    empty = State.empty(1, 1, 1)
    arrays = {}
    for name in ARRAYS:
        wanted = getattr(empty, name).dtype
        if name in shapes and found[name].shape != shapes[name]:
            raise ValueError(f"{name} has the shape {found[name].shape}, not {shapes[name]}")
        if found[name].dtype.kind != wanted.kind:
            raise ValueError(f"{name} is of {found[name].dtype}")
        arrays[name] = found[name].astype(wanted)
    return State(**arrays, told=dict(header["told"]), kept=_kept(header["where"], found))


def _spread(values: np.ndarray, at: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    if np.prod(shape) > MOST["table"] or values.shape != at.shape or values.ndim != 1:
        raise ValueError("a table of tokens does not fit")
    found = np.zeros(shape, np.int64)
    found.reshape(-1)[at] = values
    return found


def _kept(where: list[str], found: dict[str, np.ndarray]) -> dict[int, tuple[str, np.ndarray]]:
    rows, ends, places, kinds = (found[name].astype(np.int64) for name in KEPT)
    if (places < 0).any():
        raise ValueError("the texts of its examples do not fit together")
    ids = kinds[places]
    begins = np.concatenate([[0], ends[:-1]]) if len(ends) else ends
    if (
        len(rows) != len(ends)
        or len(where) != len(rows)
        or (begins > ends).any()
        or (len(ends) and ends[-1] != len(ids))
    ):
        raise ValueError("the texts of its examples do not fit together")
    each = (np.asarray(ids[a:b]) for a, b in zip(begins.tolist(), ends.tolist(), strict=True))
    return dict(zip(rows.tolist(), zip(map(str, where), each, strict=True), strict=True))


def _check_header(header: dict[str, Any]) -> None:
    run, told = header["run"], header["told"]
    numbers = [run["heads"], run["keep"], *run["layers"], *(told[name] for name in COUNTS)]
    shards = [each[name] for each in header["shards"] for name in ("shard", "of", "rows")]
    if (
        any(type(n) is not int or n < 0 for n in [*numbers, *shards])
        or not header["shards"]
        or not run["layers"]
    ):
        raise ValueError("its header holds something that is no number")
    if len(run["layers"]) > MOST["layers"] or run["heads"] > MOST["heads"] or run["keep"] > MOST["keep"]:
        raise ValueError("it claims more layers or heads than there can be")
    if not isinstance(run["model"], str) or not all(isinstance(w, str) for w in header["words"].values()):
        raise ValueError("its header holds something that is no text")
    if not all(isinstance(name, str) for name, _ in run["source"]["files"]):
        raise ValueError("its files have no names")
