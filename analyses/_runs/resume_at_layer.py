"""Forward passes over copies of a batch that start at a layer: the blocks below return stored outputs of the batch.

This is valid if only the edited layer and the layers above it differ from the stored run. Each layer is tried on copies
of the unchanged batch before runs start there: blocks may hand each other more than their outputs, such as shared keys
and values. Where the outputs are not reproduced, and in a model whose blocks are unknown, runs are in full.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
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

TRIED = 2  # copies in a trial: one would not show outputs whose first axis is another than the batch


@dataclass(frozen=True, eq=False)
class Resuming:
    """`outputs`: the output of each block for a batch, in the order of the layers; `base`: the batch's loss [text] in
    float64, if computed. `again` runs copies of the unchanged batch and tells whether they give what it gave."""

    layers: list[int]
    outputs: Mapping[nn.Module, Any] = field(default_factory=dict)
    base: Tensor = field(default_factory=lambda: torch.empty(0))
    again: Callable[[], bool] = field(default=lambda: True)
    tried: dict[int, bool] = field(default_factory=dict)

    @classmethod
    def of(cls, model: HookedModel, batch: Batch, value: Value) -> Resuming:
        """Run the batch once and store the outputs."""
        with listened(model) as outputs:
            base = value(batch).double().cpu()
        twice = batch.copies(TRIED)

        def again() -> bool:
            repeated = base.repeat(TRIED, *[1] * (base.dim() - 1))
            return torch.allclose(value(twice).double().cpu(), repeated, rtol=1e-5, atol=1e-6)

        return cls(model.layers, outputs, base, again)

    def start(self, layer: int) -> int:
        """The layer at which a run may start whose first change is in `layer`: this one, or the first of all."""
        if layer not in self.tried:
            self.tried[layer] = not self.outputs or layer == self.layers[0] or self._holds(layer)
        return layer if self.tried[layer] else self.layers[0]

    def _holds(self, layer: int) -> bool:
        try:
            with self.before(layer, TRIED):
                return self.again()
        except Exception:  # transformers has no error of its own for models that cannot start in the middle
            return False

    @contextlib.contextmanager
    def before(self, layer: int, copies: int, positions: slice | None = None) -> Iterator[None]:
        """The next run in this context, of `copies` of the batch, starts with the block of `layer`; later runs do not.

        With `positions` the run covers these positions alone.
        """

        def repeated(tensor: Tensor) -> Tensor:
            tensor = tensor.detach() if positions is None else tensor.detach()[:, positions]
            return tensor.repeat(copies, *[1] * (tensor.dim() - 1))

        below = list(self.outputs)[: self.layers.index(layer)]
        held = {block: mapped(self.outputs[block], repeated) for block in below}

        def kept(block: nn.Module) -> Any:
            return lambda *_, **__: held.pop(block, None)

        with standing_in({block: kept(block) for block in below}):
            yield


def foreign(module: nn.Module) -> bool:
    """Whether a module has hooks of a user. Hooks of transformers (left from requests for hidden states) and of
    Headwater do not count.
    """
    hooked = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return any(
        not (getattr(hook, "__module__", None) or "").startswith(("transformers.", "headwater."))
        for hook in hooked
    )


def _blocks(model: HookedModel) -> list[nn.Module]:
    """One block per layer, or none where runs can not be resumed: blocks that are unknown or shared, active edits
    (which may carry state from layer to layer), or hooks of the user (which expect every layer to run).
    """
    try:
        blocks = [anatomy.block(model, layer).module for layer in model.layers]
    except ModelError:
        return []
    hooked = any(foreign(module) for block in blocks for module in block.modules())
    return [] if hooked or context.active(model.key) or len(set(blocks)) < len(blocks) else blocks


@contextlib.contextmanager
def listened(model: HookedModel) -> Iterator[dict[nn.Module, Any]]:
    """The output of each block in a run inside the context; emptied afterwards if runs cannot be resumed."""
    blocks = _blocks(model)
    into: dict[nn.Module, Any] = {}

    def keep(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        into[block] = output

    with on(blocks, after=keep):
        yield into
    if len(into) < len(blocks):
        into.clear()


def mapped(output: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """The output of a block with `function` applied to every tensor in it."""
    if isinstance(output, tuple):
        return tuple(mapped(part, function) for part in output)
    return function(output) if isinstance(output, Tensor) else output
