"""Which tokens stand on the two axes of a part's maps, held to their number in one run.

A name in the module's path is a first guess; the guess stands if the map has as many rows and columns as the inputs
have tokens. A Q-Former is named like a text encoder and reads queries of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from headwater.lens.models.signature import FLOATS

CONSTANT = (
    "query",
    "state",
)  # axes whose length no input gives: learned queries, and other states of the model
GENERAL = (
    "model",
    "encoder",
    "decoder",
    "layer",
    "layers",
    "block",
    "blocks",
)  # say nothing of what a stack is


class Axes(NamedTuple):
    """The names of both axes, and {name: number of positions} of those whose length no input gives."""

    queries: str
    keys: str
    counts: dict[str, int]


def axes_of(
    kind: str, shape: tuple[int, int], sample: Mapping[str, Tensor], image: int | None, encodes: bool
) -> Axes:  # fmt: skip
    """The axes of a part that looks like `kind` ("text", "decoder", "encoder", "vision", "audio" or "cross").

    `shape` is (rows, columns) of its maps on `sample`, `image` the number of tokens of an image, and `encodes` says
    whether the model is an encoder–decoder.
    """
    text = _length(sample, "input_ids")
    known = {"text": text, "encoder": text, "decoder": text, "image": image}
    known["decoder"] = _length(sample, "decoder_input_ids") if encodes else text
    known["series"] = _length(sample, "inputs")  # Perceiver's latents read them
    sound = next((FLOATS[name] for name in sample if name in FLOATS), "encoder")
    source = "encoder" if "input_ids" in sample else sound
    main = "decoder" if encodes else "text"
    queries = {"vision": "image", "encoder": source, "cross": main}.get(kind, kind)
    unread = queries in ("text", "decoder") and known[queries] is None  # DETR's decoder reads learned queries
    if unread or known.get(queries) not in (None, shape[0]):
        queries = "query"
    if kind == "cross":
        seen = [name for name in ("image",) if name in {FLOATS.get(given) for given in sample}]
        keys = next((name for name in (source, *seen) if known.get(name) in (None, shape[1])), "state")
        keys = next(iter(seen), "text") if keys == "encoder" and not encodes else keys
    else:
        keys = queries if shape[0] == shape[1] else "state"
    lengths = {queries: shape[0], keys: shape[1]}
    return Axes(
        queries, keys, {name: lengths[name] for name in lengths if name in (*CONSTANT, "image", "series")}
    )


def own_name(where: str) -> str:
    """A name for a stack of learned queries, from the path of its modules: "qformer"."""
    pieces = [piece for piece in where.partition(".*")[0].split(".") if piece not in GENERAL]
    return pieces[-1] if pieces else "query"


def _length(sample: Mapping[str, Tensor], name: str) -> int | None:
    return sample[name].shape[1] if name in sample else None
