"""What a head reads from each part of the stream: queries, keys and values as sums over all that wrote before.

The norm in front of the attention is taken with its scale as it is in the run, so it is linear; what it and the
projection add by themselves is the part "bias". Rotation by position is linear too, and is found by what it makes of
unit vectors in the model itself, so that every kind of it is met.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from headwater.analyses._prompts.examples import Batch
from headwater.analyses._runs.replace_activations import Swap
from headwater.analyses._streams.frozen_norm import Norm
from headwater.analyses._streams.writers import Writers
from headwater.lens.model import HookedModel
from headwater.lens.models import blocks
from headwater.lens.models.closeness import close_or_refuse
from headwater.lens.naming.heads import Head, named
from headwater.lens.transformer_lens.run import Function

BIAS = "bias"


def one_head(model: HookedModel, text: str | Head) -> Head:
    """The head called so, or an error that names those there are."""
    return named([text], model.layers, model.n_heads)[0]


@dataclass(frozen=True, eq=False)
class Reading:
    """`parts` [batch, position, component, d_model] of the normalised stream that a layer's attention reads, "bias"
    last; `names` of the components."""

    names: list[str]
    parts: Tensor

    @classmethod
    def of(cls, run: Writers, layer: int) -> Reading:
        norm = blocks.block(run.model, layer).norm1
        named = dict(run.parts(layer))
        stacked = torch.stack(list(named.values()), 2)
        constant = torch.zeros_like(stacked[:, :, :1])
        if norm is not None:
            stacked = Norm.of(norm, run.layers[layer].entering).divided(stacked)
            constant = constant + blocks.norm_bias(norm, stacked.shape[-1]).to(stacked)
        return cls([*named, BIAS], torch.cat([stacked, constant], 2))

    def through(self, matrix: Tensor, bias: Tensor) -> Tensor:
        """[batch, position, component, d] behind a projection [d_model, d], whose bias [d] goes to "bias"."""
        found = self.parts @ matrix.double()
        found[:, :, -1] += bias.double()
        return found


def rotations(model: HookedModel, batch: Batch, head: Head, places: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """What stands between a head's projections and its scores, [d, d] for the query at one place, the key at another.

    Unit vectors are put behind the projections, one in each copy of a text, and met again where attention begins.
    """
    layer, group = head.layer, model.n_heads // model.n_kv_heads
    count = model.d_head
    forward: dict[str, Function] = {}
    for part, place, index in (("q", places[0], head.head), ("k", places[1], head.head // group)):
        forward[f"blocks.{layer}.attn.hook_{part}"] = _units(place, index)
    swap = Swap(model, count, forward=forward, parts=[layer])
    swap.logits(batch.ids[:1].repeat(count, 1), 0)
    q, k = (swap.seen[layer][part].double() for part in "qk")
    return q[:, head.head, places[0]], k[:, head.head // group, places[1]]


def refuse_other_sum(found: Tensor, expected: Tensor, what: str) -> None:
    """AnalysisError where parts do not add up to what the model computed."""
    then = (
        ": something between the stream and it is not linear (a norm on queries and keys), or an edit is on"
    )
    close_or_refuse(found, expected, f"{what} does not add up from its parts", then, least=1e-2)


def _units(place: int, index: int) -> Function:
    def put(tensor: Tensor, hook: object) -> Tensor:
        tensor[:, place, index] = torch.eye(tensor.shape[-1], dtype=tensor.dtype, device=tensor.device)
        return tensor

    return put
