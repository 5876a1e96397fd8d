"""Runs of copies of a batch that begin at a layer: the blocks below hand back what they gave for the batch itself.

It holds as long as nothing but the edited layer and those above it differs from the run that was kept. That is tried
on the last layer before it is used; a model whose blocks are not found, or do not give the same again, runs whole.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from headwater.analyses._prompts.examples import Batch, Value
from headwater.lens.attention import context
from headwater.lens.attention.module_hooks import on
from headwater.lens.attention.standing_in import standing_in
from headwater.lens.errors import ModelError
from headwater.lens.model import HookedModel
from headwater.lens.models import blocks as anatomy


@dataclass(frozen=True, eq=False)
class Resuming:
    """`outputs`: what each block gave for a batch, in the order of the layers; `base`: the batch's loss [text] in
    float64, where that was asked."""

    layers: list[int]
    outputs: Mapping[nn.Module, Any] = field(default_factory=dict)
    base: Tensor = field(default_factory=lambda: torch.empty(0))

    @classmethod
    def of(cls, model: HookedModel, batch: Batch, value: Value) -> Resuming:
        """Run the batch once, and try what was kept."""
        with listened(model) as outputs:
            base = value(batch).double().cpu()
        found = cls(model.layers, outputs, base)
        if found.outputs:
            with found.before(model.layers[-1], 1):
                again = value(batch).double().cpu()
            if not torch.allclose(again, base, rtol=1e-5, atol=1e-6):
                return cls(model.layers, {}, base)
        return found

    @contextlib.contextmanager
    def before(self, layer: int, copies: int, positions: slice | None = None) -> Iterator[None]:
        """The next run in this context, of `copies` of the batch, begins with the block of `layer`; no later one.

        With `positions` it is a run of these alone.
        """
        below = list(self.outputs)[: self.layers.index(layer)] if self.outputs else []
        held = {block: _repeated(self.outputs[block], copies, positions) for block in below}

        def kept(block: nn.Module) -> Any:
            return lambda *_, **__: held.pop(block, None)

        with standing_in({block: kept(block) for block in below}):
            yield


def foreign(module: nn.Module) -> bool:
    """Whether a module has hooks of a user: transformers leaves some where hidden states were once asked for, and those
    of Headwater do nothing for whoever does not listen."""
    hooked = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return any(
        not (getattr(hook, "__module__", None) or "").startswith(("transformers.", "headwater."))
        for hook in hooked
    )


def _blocks(model: HookedModel) -> list[nn.Module]:
    """One block per layer, or none where that is not so, where edits are on, which may carry what they saw from layer
    to layer, or where the user's own hooks wait for every layer."""
    if context.active(model.key):
        return []
    try:
        blocks = [anatomy.block(model, layer).module for layer in model.layers]
    except ModelError:
        return []
    if any(foreign(module) for block in blocks for module in block.modules()):
        return []
    return blocks if len(set(blocks)) == len(blocks) else []


@contextlib.contextmanager
def listened(model: HookedModel) -> Iterator[dict[nn.Module, Any]]:
    """What each block of the model gives in a run inside; empty behind it where a run can not be resumed."""
    blocks = _blocks(model)
    into: dict[nn.Module, Any] = {}

    def keep(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        into[block] = output

    with on(blocks, after=keep):
        yield into
    if len(into) < len(blocks):
        into.clear()


def _repeated(output: Any, copies: int, positions: slice | None) -> Any:
    if isinstance(output, Tensor):
        output = output.detach() if positions is None else output.detach()[:, positions]
        return output.repeat(copies, *[1] * (output.dim() - 1))
    if isinstance(output, tuple):
        return tuple(_repeated(part, copies, positions) for part in output)
    return output
