"""A short way through the attention function for layers that are alike and that nobody changes.

What is on (edits, taps, gates, windows, shortened sequences, another backend) is looked up in every layer. Where
nothing is, a layer of a pass differs from the one before in its numbers alone: what the first one found out stands
with the mask, which all layers of a pass share, and the others go straight to the kernel (kernels/repeated.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

from headwater.kernels.repeated import Repeated
from headwater.kernels.rules.rule import ScoreRule
from headwater.lens.attention import context, shortening
from headwater.lens.attention.masks import LazyMask


def attended(
    model: object, layer: int, q: Tensor, k: Tensor, v: Tensor, given: Tensor | None, scale: float
) -> Tensor | None:
    """z [batch, query, head, d_value] of one layer, which the listeners have taken; None where the long way is needed.

    The caller has found that the call asks for nothing but a scale and the `given` mask.
    """
    if type(given) is not LazyMask or not context.only_listeners(model):
        return None
    if shortening.of(model, layer) is not None:
        return None
    listeners = context.listeners(model)
    wanted = tuple(name for listener in listeners for name in listener.statistics)
    form = q.shape, k.shape, v.shape, q.dtype, k.dtype, v.dtype, q.device
    asked = scale, wanted, form, torch.is_grad_enabled()
    if given.alike is None or given.alike[0] != asked:
        given.alike = asked, _repeated(q, k, v, given, scale, wanted)
    layers = given.alike[1]
    if layers is None:
        return None
    z, lse = layers.attend(q, k, v)
    if listeners:
        map = layers.map(q, k, lse)
        for listener in listeners:
            listener.take(layer, map, v, z)
    return z.transpose(1, 2).contiguous()


def _repeated(
    q: Tensor, k: Tensor, v: Tensor, given: LazyMask, scale: float, wanted: tuple[str, ...]
) -> Repeated | None:
    mask = given.mask
    if given.bias is not None or (mask.queries, mask.keys) != (q.shape[2], k.shape[2]):
        return None
    return Repeated.of(q, k, v, ScoreRule(scale, mask), wanted)
