"""`EffectiveMap`: the exact map of one layer that mixes positions without softmax attention, and what it acts on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from jaxtyping import Float
from torch import Tensor

from headwater.kernels.mixers.mixer_map import MixerMap


@dataclass(frozen=True, eq=False)
class EffectiveMap:
    """One layer's mixing of positions as `map @ values`, exact and signed.

    The map acts on the layer's **inner values** [batch, head, position, c], not on the residual stream: what the layer
    made of the stream before its recurrence, after its own short convolution where it has one. `skip` [head] is a
    position's own value that the layer adds (D in Mamba), and `offset` [head] a bias (of a convolution); neither is in
    the map. `inner` is the sum. `output` [batch, position, d_model] is what the layer wrote, after its gate, norm and
    projection. "head" is a channel where each channel has a map of its own (Mamba-1, RG-LRU, short convolution).

    `kind` is "linear attention" (Katharopoulos et al. 2020, arXiv 2006.16236), "gated delta rule" (Yang et al. 2024,
    arXiv 2412.06464), "selective state space" (Gu & Dao 2023, arXiv 2312.00752; Dao & Gu 2024, arXiv 2405.21060; as
    attention: Ali et al. 2024, arXiv 2403.01590), "RG-LRU" (De et al. 2024, arXiv 2402.19427) or "short convolution".
    `path` and `name` are the module and its class.
    """

    layer: int
    path: str
    name: str
    kind: str
    map: MixerMap
    values: Float[Tensor, "batch head position c"]
    output: Float[Tensor, "batch position d_model"]
    skip: Float[Tensor, " head"] | None = None
    offset: Float[Tensor, " head"] | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def inner(self) -> Float[Tensor, "batch head position c"]:
        """`map @ values + skip · values + offset`: what the layer's gate, norm and projection take."""
        return inner(self.map, self.values, self.skip, self.offset)

    def __repr__(self) -> str:
        return f"EffectiveMap(layer {self.layer}, {self.kind}, {self.map.shape}, {self.name} at {self.path})"


def inner(map: MixerMap, values: Tensor, skip: Tensor | None, offset: Tensor | None) -> Tensor:
    """`map @ values + skip · values + offset`, [batch, head, position, c]."""
    out = map @ values
    out = out if skip is None else out + skip[:, None, None] * values
    return out if offset is None else out + offset[:, None, None]
