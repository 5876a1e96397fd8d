"""`Contents`: the data of a record, as a file stores it; `Record` adds the methods."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from jaxtyping import Bool, Float, Int
from torch import Tensor

from headwater.kernels.maps.attention_map import AttentionMap
from headwater.lens.mixers.effective_map import EffectiveMap
from headwater.lens.naming.grids import Grids

# axes on which the number of a token says nothing of its place
UNORDERED = ("image", "query", "state", "words and image", "image and words")


class Axis(NamedTuple):
    """Token ids int64, which of them are real (bool), both [batch, position], their text by row, and the pictures
    whose patches they are, by row."""

    tokens: Int[Tensor, "batch position"]
    valid: Bool[Tensor, "batch position"]
    strings: list[list[str]]
    grids: Grids = ()

    def __repr__(self) -> str:
        batch, length = self.tokens.shape
        return f"Axis({batch} × {length} tokens)"


@dataclass(frozen=True, eq=False)
class Contents:
    """`valid` marks real tokens; `strings` holds the text of every token, by batch row.

    `statistics` are tensors with the layer at axis 1. `maps` and `values` are by layer, and empty if only statistics
    were kept. `groups` are the named groups of keys. `keys` are the tokens of the key axis in cross-attention; None
    means: the same tokens as the queries. `parts` are the records of the other parts of a model: "encoder" and "cross"
    beside a decoder, "vision" beside a text. `residuals` are the stream entering each layer, and "final" after the
    last; at padding they hold whatever the model computed there. `effective` are the exact maps of layers without
    softmax attention, by layer, where they were kept. `grids` say which tokens are patches, and where on their picture.
    """

    tokens: Int[Tensor, "batch position"]
    valid: Bool[Tensor, "batch position"]
    strings: list[list[str]]
    layers: list[int]
    n_heads: int
    causal: bool
    statistics: MutableMapping[str, Tensor]
    maps: Mapping[int, AttentionMap]
    values: Mapping[int, Float[Tensor, "batch kv_head key d_value"]]
    groups: dict[str, Bool[Tensor, "batch key"]]
    provenance: dict[str, Any] = field(default_factory=dict)
    keys: Axis | None = None
    parts: Mapping[str, Contents] = field(default_factory=dict)
    residuals: Mapping[int | str, Float[Tensor, "batch position d_model"]] = field(default_factory=dict)
    effective: Mapping[int, EffectiveMap] = field(default_factory=dict)
    grids: Grids = ()

    @property
    def ordered(self) -> bool:
        """Whether the number of a token says where it stands: not in cross-attention, nor where tokens are the patches
        of a picture, row by row, or learned queries."""
        return self.keys is None and self.ordered_keys

    @property
    def ordered_keys(self) -> bool:
        """Whether the tokens that are looked at follow each other."""
        return self.provenance.get("axes", ["text"])[-1] not in UNORDERED

    @property
    def query_axis(self) -> Axis:
        """The tokens that look."""
        return Axis(self.tokens, self.valid, self.strings, self.grids)

    @property
    def key_axis(self) -> Axis:
        """The tokens that are looked at: `keys` in cross-attention, else the record's own tokens."""
        return self.query_axis if self.keys is None else self.keys
