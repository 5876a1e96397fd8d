"""The output gate of an attention layer: factors on the heads' outputs z in front of the output projection.

Gated attention (Qwen3-Next, Qwen3.5, AFMoE, Laguna, LFM3 …; Qiu et al. 2025, arXiv 2505.06708) multiplies z by an
activation of a projection of the layer's own input, one factor per head or per feature. No name is asked: the
attention module runs once more with ones in the place of z, and what then enters its output projection is the gate.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from headwater.lens.attention import context, windows
from headwater.lens.attention.module_hooks import on
from headwater.lens.errors import ModelError
from headwater.lens.models import inputs
from headwater.lens.models.closeness import close_or_refuse
from headwater.lens.models.opened import Opened
from headwater.lens.models.projections import Projection, attention_with_projections, projections
from headwater.lens.naming.tokens import Tokens
from headwater.lens.running.short_input import short_input
from headwater.lens.running.watching import Call, Heads, watching

LENGTH = 8  # tokens of the run that shows whether there are gates


class _Ones(context.Tap):
    """Ones for the output of every head of a layer, or what `z` gives."""

    def __init__(self, layer: int) -> None:
        self.layer = layer

    def leaving(self, layer: int, z: Tensor) -> Tensor:
        return torch.ones_like(z) if layer == self.layer else z


def modules_of(model: Opened, layer: int) -> tuple[nn.Module, nn.Module]:
    """The attention module of a layer and its output projection: what must be watched for `output_gate`. ModelError
    for windows that are folded into the batch, whose modules read no row of the grid."""
    if windows.head_width(model.attention_module(layer)):
        raise ModelError(
            f"{model.name} folds windows into the batch, so its heads' outputs can not be followed through its "
            "modules; read its maps, or edit its heads"
        )
    return attention_with_projections(model, layer), projections(model, layer).output


def output_gate(model: Opened, layer: int, calls: Sequence[Call], z: Tensor) -> Tensor | None:
    """The gate [batch, head, position, d_value] of a run, None without one.

    `calls` are those of `modules_of` in the run, `z` [batch, head, position, d_value] the heads' outputs there.
    ModelError where z reaches the output projection otherwise than times a gate, such as through a norm.
    """
    attention, output = modules_of(model, layer)
    entered = _by_head(next(call for call in calls if call.module is output).given, z)
    if torch.equal(entered, z.detach().to(entered)):
        return None
    call = next(call for call in calls if call.module is attention)
    with torch.no_grad(), context.tapping(model.key, _Ones(layer)), watching([output]) as again:
        call.again(call.given)
    gate = _by_head(again[0].given, z)
    close_or_refuse(
        gate.double() * z.detach().double(), entered.double(),
        f"the heads' outputs of layer {layer} of {model.name} reach the output projection otherwise than times a gate",
        " (a norm between them?), so what a head writes is not known", error=ModelError,
        allowed=1e-4 if model.dtype in (torch.float32, torch.float64) else 3e-2,
    )  # fmt: skip
    return gate


def gates_of_run(model: Opened, ids: Tensor) -> dict[int, tuple[Heads, Tensor | None]]:
    """The gate of every layer on prompts of equal length, ids [batch, position]; None in layers without one."""
    given = (
        {"input_ids": ids.to(model.device)} if not isinstance(ids, Tokens) else inputs.arguments(model, ids)
    )
    return _gates(model, given)


def _gates(model: Opened, given: Mapping[str, Any]) -> dict[int, tuple[Heads, Tensor | None]]:
    watched = {layer: modules_of(model, layer) for layer in model.layers}
    heads = Heads(model)
    with (
        torch.no_grad(),
        watching([m for pair in watched.values() for m in pair]) as calls,
        context.listening(heads),
    ):
        _run(model, given)
    return {
        layer: (heads, output_gate(model, layer, calls, heads.layers[layer][2])) for layer in model.layers
    }


def read_gates(model: Opened) -> dict[int, Projection | None]:
    """What the output gate of each layer is the activation of; None in layers without a gate.

    ModelError where a gate is the activation of anything else: it is held to be constant once that projection is.
    """
    given = short_input(model, LENGTH)
    found: dict[int, Projection | None] = {}
    for layer, (_, gate) in _gates(model, given).items():
        found[layer] = None
        if gate is None:
            continue
        projection = found[layer] = projections(model, layer).gate
        if projection is None or not _is_all(model, layer, projection, given):
            raise ModelError(
                f"the output gate of layer {layer} of {model.name} is not the activation of one projection of the "
                "stream that is known, so what a head reads is not known"
            )
    return found


def _is_all(model: Opened, layer: int, projection: Projection, given: Mapping[str, Any]) -> bool:
    """Whether a layer's gate depends on the projection alone."""

    def silence(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
        output = output.clone()
        projection.heads(output).zero_()
        return output

    _, output = modules_of(model, layer)
    with (
        torch.no_grad(), on(projection.module, after=silence), context.tapping(model.key, _Ones(layer)),
        watching([output]) as calls,
    ):  # fmt: skip
        _run(model, given)
    entered = calls[0].given.flatten(0, -2)
    return bool(torch.allclose(entered, entered[:1], atol=1e-4))


def _run(model: Opened, given: Mapping[str, Any]) -> None:
    cached = "use_cache" in inspect.signature(model.hf.forward).parameters
    model.hf(**{**given, **({"use_cache": False} if cached else {})})


def _by_head(entered: Tensor, z: Tensor) -> Tensor:
    """What entered the output projection, [batch, position, head · d] or [rows, head · d], in the shape of z."""
    batch, heads, length, width = z.shape
    return entered.reshape(batch, length, heads, width).transpose(1, 2)
