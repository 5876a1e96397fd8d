"""An attention function of its own for transformers: dense, float64, with edits written out on the whole map.

It shares no code with Headwater: masks come from transformers' eager mask function, edits are plain closures on scores,
weights and outputs. The tests run the same model through it and compare.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import eager_mask

NAME = "dense_oracle"


@dataclass
class Oracle:
    """`scores`, `weights`, `outputs` take (layer, tensor) and return the edited tensor; `maps` collects the weights.

    `normalise` turns masked scores, a learned sink as their last column, into weights.
    """

    scores: Callable[[int, Tensor], Tensor] = lambda layer, s: s
    weights: Callable[[int, Tensor], Tensor] = lambda layer, w: w
    outputs: Callable[[int, Tensor], Tensor] = lambda layer, z: z
    normalise: Callable[[Tensor], Tensor] = lambda s: s.softmax(-1)
    maps: dict[int, Tensor] = field(default_factory=dict)
    z: dict[int, Tensor] = field(default_factory=dict)


_running: list[Oracle] = []


def _attention(module, query, key, value, attention_mask, scaling=None, softcap=None, s_aux=None, **_):
    oracle, layer = _running[-1], module.layer_idx
    group = query.shape[1] // key.shape[1]
    q, k, v = (
        query.double(),
        key.double().repeat_interleave(group, 1),
        value.double().repeat_interleave(group, 1),
    )
    scores = (query.shape[-1] ** -0.5 if scaling is None else scaling) * q @ k.mT
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = oracle.scores(layer, scores)
    if attention_mask is not None:
        hidden = attention_mask[..., : key.shape[2]] < -1e30
        scores = scores.masked_fill(hidden, -torch.inf)
    full = scores
    if s_aux is not None:
        full = torch.cat([scores, s_aux.double()[None, :, None, None].expand(*scores.shape[:3], 1)], -1)
    weights = oracle.normalise(full).nan_to_num(0.0)[..., : scores.shape[-1]]
    weights = oracle.weights(layer, weights)
    oracle.maps[layer] = weights
    z = oracle.outputs(layer, weights @ v)
    oracle.z[layer] = z
    return z.transpose(1, 2).to(value.dtype).contiguous(), None


def _mask(*args, **kwargs):
    return eager_mask(
        *args, **(kwargs | {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})
    )


if NAME in AttentionInterface():
    raise ImportError("dense_oracle is loaded under two names; import it as dense_oracle alone")
AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)


def run(
    model: PreTrainedModel, ids: Tensor, mask: Tensor | None = None, oracle: Oracle | None = None, **more
) -> Tensor:
    """Logits of the model with dense attention; the oracle's closures edit it and its `maps` are filled."""
    oracle = oracle or Oracle()
    model.set_attn_implementation(NAME)
    _running.append(oracle)
    try:
        with torch.no_grad():
            return model(input_ids=ids, attention_mask=mask, **more).logits
    finally:
        _running.pop()
