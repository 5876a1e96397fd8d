"""`Contents`: what is in a record, without what can be asked of it; a file holds this."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from jaxtyping import Bool, Float, Int
from torch import Tensor

from headwater.kernels.maps.attention_map import AttentionMap


class Axis(NamedTuple):
    """Tokens int64, which of them are real, and their text: [batch, position]."""

    tokens: Int[Tensor, "batch position"]
    valid: Bool[Tensor, "batch position"]
    strings: list[list[str]]


@dataclass(frozen=True, eq=False)
class Contents:
    """`tokens` int64 and `valid` bool are [batch, position]; `strings` are the tokens as text, per batch row.

    `statistics` are tensors with the layer at axis 1; `maps` is empty where only statistics were kept. `keys` are the
    tokens of the key axis where these are others, as in cross-attention. `parts` are the records of a model's other
    parts: "encoder" and "cross" beside a decoder, "vision" beside a text. `residuals` are the residual stream
    [batch, position, d_model] entering each layer, and "final" behind the last; padding holds what the model made.
    """

    tokens: Int[Tensor, "batch position"]
    valid: Bool[Tensor, "batch position"]
    strings: list[list[str]]
    layers: list[int]
    n_heads: int
    causal: bool
    statistics: MutableMapping[str, Tensor]
    maps: dict[int, AttentionMap]
    values: dict[int, Float[Tensor, "batch kv_head key d_value"]]
    groups: dict[str, Bool[Tensor, "batch key"]]
    provenance: dict[str, Any] = field(default_factory=dict)
    keys: Axis | None = None
    parts: Mapping[str, Contents] = field(default_factory=dict)
    residuals: dict[int | str, Float[Tensor, "batch position d_model"]] = field(default_factory=dict)
