"""Runs of copies of a batch that begin at a layer: the blocks below hand back what they gave for the batch itself.

It holds as long as nothing but the edited layer and those above it differs from the run that was kept. That is tried
on the last layer before it is used; a model whose blocks are not found, or do not give the same again, runs whole.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from headwater.analyses._examples import Batch, Value
from headwater.lens import anatomy, hooks
from headwater.lens.errors import ModelError
from headwater.lens.model import HookedModel

_kept: ContextVar[dict[nn.Module, Any] | None] = ContextVar("headwater_resuming", default=None)


@dataclass(frozen=True, eq=False)
class Resuming:
    """`base`: the loss of a batch [text] in float64; `outputs`: what each block gave, in the order of the layers."""

    base: Tensor
    layers: list[int]
    outputs: Mapping[nn.Module, Any]

    @classmethod
    def of(cls, model: HookedModel, batch: Batch, value: Value) -> Resuming:
        """Run the batch once. Nothing is kept under edits, which may carry what they saw from layer to layer, nor where
        the user's own hooks wait for every layer."""
        blocks = [] if hooks.active(model.key) else _blocks(model)
        if any(_foreign(module) for b in blocks for module in b.modules()):
            blocks = []
        outputs: dict[nn.Module, Any] = {}
        with _listened(blocks, outputs):
            base = value(batch).double().cpu()
        found = cls(base, model.layers, outputs if len(outputs) == len(blocks) else {})
        if found.outputs:
            with found.before(model.layers[-1], 1):
                again = value(batch).double().cpu()
            if not torch.allclose(again, base, rtol=1e-5, atol=1e-6):
                return cls(base, model.layers, {})
        return found

    @contextlib.contextmanager
    def before(self, layer: int, copies: int) -> Iterator[None]:
        """The next run in this context, of `copies` of the batch, begins with the block of `layer`; no later one."""
        below = list(self.outputs)[: self.layers.index(layer)] if self.outputs else []
        held = {block: _repeated(self.outputs[block], copies) for block in below}
        token = _kept.set(held)
        undo = [_skippable(block) for block in below]
        try:
            yield
        finally:
            _kept.reset(token)
            for put_back in reversed(undo):
                put_back()


def _foreign(module: nn.Module) -> bool:
    """Whether a module has hooks of a user: transformers leaves some where hidden states were once asked for, and those
    of Headwater do nothing for whoever does not listen."""
    hooked = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return any(
        not (getattr(hook, "__module__", None) or "").startswith(("transformers.", "headwater."))
        for hook in hooked
    )


def _blocks(model: HookedModel) -> list[nn.Module]:
    """One block per layer, or none where that is not so."""
    try:
        blocks = [anatomy.block(model, layer).module for layer in model.layers]
    except ModelError:
        return []
    return blocks if len(set(blocks)) == len(blocks) else []


@contextlib.contextmanager
def _listened(blocks: list[nn.Module], into: dict[nn.Module, Any]) -> Iterator[None]:
    mine: dict[nn.Module, Any] = {}
    token = _kept.set(mine)  # tells this caller's run from those of other threads

    def keep(module: nn.Module, _: Any, output: Any) -> None:
        if _kept.get() is mine:
            into[module] = output

    handles = [block.register_forward_hook(keep) for block in blocks]
    try:
        yield
    finally:
        _kept.reset(token)
        for handle in handles:
            handle.remove()


def _skippable(block: nn.Module):
    """Let a block give what this context holds for it; other threads run it as it is. Returns what undoes that."""
    forward, own = block.forward, vars(block).get("forward")

    def give(*args: Any, **kwargs: Any) -> Any:
        held = _kept.get() or {}
        return held.pop(block) if block in held else forward(*args, **kwargs)

    block.forward = give  # a hook can change what a module gives, but not keep it from running

    def put_back() -> None:
        if vars(block).get("forward") is give:
            if own is None:
                del block.forward
            else:
                block.forward = own

    return put_back


def _repeated(output: Any, copies: int) -> Any:
    if isinstance(output, Tensor):
        return output.detach().repeat(copies, *[1] * (output.dim() - 1))
    if isinstance(output, tuple):
        return tuple(_repeated(part, copies) for part in output)
    return output
