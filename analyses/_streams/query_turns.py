"""How rotary positions turn a query from one position to the next, and what that makes of queries further on.

The turn `T` is measured on the model: unit queries stand at two positions, and what attention gets there is
`Q_0 = A R_0` and `Q_1 = A R_1`, with the same A for whatever the model does to a query before it is turned (a norm).
`T = Q_0⁻¹ Q_1`. A query at position p is `q T^(f-p)` at position f; queries are rows. Frequencies that depend on the
length of the text are those of a short text.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from headwater.lens.errors import AnalysisError
from headwater.lens.model import HookedModel
from headwater.lens.models.closeness import rounding_mend
from headwater.lens.transformer_lens import names

NEAR = 1e-3  # how far a measured turn may be from a rotation


def query_turns(model: HookedModel, tokens: Tensor) -> dict[int, Tensor]:
    """T by layer, [d_head, d_head] in float64; the identity without rotary positions. `tokens` are any two ids.

    AnalysisError where queries are not turned by one rotation per step.
    """
    sizes = {layer: model.shape(layer).d_head for layer in model.layers}
    if not names.is_rotary(model):
        return {layer: torch.eye(size, dtype=torch.float64) for layer, size in sizes.items()}
    found: dict[int, Tensor] = {}
    unit = torch.eye(max(sizes.values()))

    def give(q: Tensor, hook: Any) -> Tensor:
        return unit[:, None, None, : q.shape[-1]].to(q).expand_as(q)

    def keep(q: Tensor, hook: Any) -> None:
        found[hook.layer()] = q[: q.shape[-1], :, 0].double().cpu().movedim(1, 0)

    hooks: list[Any] = []
    for layer in model.layers:
        hooks += [(f"blocks.{layer}.attn.hook_q", give), (f"blocks.{layer}.attn.hook_rot_q", keep)]
    with torch.no_grad():
        model.run_with_hooks(tokens.view(1, 2).repeat(len(unit), 1), hooks, return_type=None)
    return {layer: _turn(model, layer, *found[layer]) for layer in model.layers}


def _turn(model: HookedModel, layer: int, here: Tensor, next_one: Tensor) -> Tensor:
    turn = torch.linalg.pinv(here) @ next_one
    left, lengths, right = torch.linalg.svd(turn)
    if rounding_mend(model) or not bool((lengths - 1).abs().max() < NEAR):
        raise AnalysisError(
            f"layer {layer} of {model.name} does more to its queries than turn them with the position, so they can not "
            f"be turned to another one{rounding_mend(model)}"
        )
    return left @ right  # the nearest rotation


def at_start(x: Tensor, turn: Tensor, places: Tensor) -> Tensor:
    """Queries or keys [batch, head, position, d] as they would be at position 0; `places` [batch, position] are where
    they stand."""
    x, places, power = x.clone(), places.clamp_min(0)[:, None, :, None], turn.mT
    while bool((places > 0).any()):
        x = torch.where(places % 2 == 1, x @ power, x)
        places, power = places // 2, power @ power
    return x


def mean_turn(turn: Tensor, begin: int, count: int) -> Tensor:
    """The mean of `T^f` over the `count` positions f from `begin` on."""
    power = torch.linalg.matrix_power(turn, begin)
    total = torch.zeros_like(turn)
    for _ in range(count):
        total, power = total + power, power @ turn
    return total / count
