"""Records that a visitor uploads: checked before they are read, kept under their digest, and opened by that alone.

The file is a stranger's. Its size is bounded, so are the size of its header and what it says that it holds; nothing in
it is executed, and what is no number is refused here, so that no page meets it.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

import headwater as hw
from headwater.dashboard.state import workspace
from headwater.lens.errors import HeadwaterError, RecordError
from headwater.lens.records.contents import Contents

PREFIX = workspace.RECORD
KINDS = ("safetensors",)
MOST_MEGABYTES = workspace.MOST_BYTES["records"] // 2**20
MOST_HEADER = 2**24  # bytes
MOST_HEADS = 20_000  # in all layers and parts
MOST_TOKENS = 65_536  # of one text
MOST_PAIRS = 2**33  # of tokens, in all maps: pages walk over them
FILE = "the uploaded file"


def take(content: bytes) -> str:
    """Keep an uploaded record, and give the name under which it opens. RecordError for what is none, or is too much."""
    _check_header(content)
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "upload"
            path.write_bytes(content)
            try:
                found = hw.Record.open(path, verify=True)
            except HeadwaterError as error:
                raise RecordError(str(error).replace(str(path), FILE)) from None
    except OSError as error:
        raise RecordError(f"{FILE} can not be looked at: {error.strerror or error}") from None
    _check(found)
    return PREFIX + workspace.keep("records", content)


def path(name: str) -> Path | None:
    """The file of an uploaded record; None for any other name, and where it is not kept."""
    return workspace.place("records", name.removeprefix(PREFIX)) if name.startswith(PREFIX) else None


def _check_header(content: bytes) -> None:
    """Refuse by its first bytes what a safetensors file of this size can not be."""
    length = int.from_bytes(content[:8], "little")
    if not 2 <= length <= len(content) - 8 or content[8:9] != b"{":
        raise RecordError(f"{FILE} is no safetensors file, or was cut short; give one that record.save wrote")
    if length > MOST_HEADER:
        raise RecordError(
            f"{FILE} has a header of {length:,} bytes, more than the {MOST_HEADER:,} taken here"
        )


def _check(found: Contents) -> None:
    """Refuse a record too large to be shown here, and one with numbers that are none."""
    every = [found, *found.parts.values()]
    heads = sum(len(each.layers) * each.n_heads for each in every)
    tokens = max(count for each in every for count in (each.tokens.shape[1], each.key_axis.tokens.shape[1]))
    pairs = sum(math.prod(map.shape) for each in every for map in each.maps.values())
    bounds = (
        (heads, MOST_HEADS, "heads"),
        (tokens, MOST_TOKENS, "tokens"),
        (pairs, MOST_PAIRS, "pairs of tokens"),
    )
    for count, most, what in bounds:
        if count > most:
            raise RecordError(f"{FILE} holds {count:,} {what}, more than the {most:,} that are shown here")
    if not all(bool(each.valid.any()) and bool(each.key_axis.valid.any()) for each in every):
        raise RecordError(f"{FILE} holds no tokens")
    for each in every:
        for what, tensor in _finite(each):
            if not bool(torch.isfinite(tensor).all()):
                raise RecordError(f"{FILE} holds numbers that are none (NaN or infinite) in {what}")
        for what, tensor in _partly(each):  # NaN stands for a token that sees no key, or that no query sees
            if bool(torch.isinf(tensor).any()) or bool(torch.isnan(tensor).all()):
                raise RecordError(f"{FILE} holds numbers that are none (NaN or infinite) in {what}")


def _finite(each: Contents) -> Iterator[tuple[str, torch.Tensor]]:
    """What must be finite: queries, keys, values, and the streams of tokens that are no padding."""
    for layer, map in each.maps.items():
        yield f"the queries of layer {layer}", map.q
        yield f"the keys of layer {layer}", map.k
        # a row that sees no key has an infinite one
        yield f"the log-sum-exp of layer {layer}", map.lse[~torch.isinf(map.lse)]
    for layer, value in each.values.items():
        yield f"the values of layer {layer}", value
    for layer, mixed in each.effective.items():
        yield f"the values of layer {layer}", mixed.values
    for place, stream in each.residuals.items():
        yield f"the stream at {place}", stream[each.valid]


def _partly(each: Contents) -> Iterator[tuple[str, torch.Tensor]]:
    for name, values in each.statistics.items():
        for place, layer in enumerate(each.layers):
            if values.is_floating_point():
                yield f"the statistic {name} of layer {layer}", values[:, place]
