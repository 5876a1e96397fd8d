"""Redistribution from massive activations to the image, with the sinks found in the edited run (VAR, Kang et al. 2025).

The sinks of a layer are read from the stream that enters it while it runs, so that an edit of an earlier layer can
change the sinks of a later one. Checked against the authors' code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from headwater.kernels.edits import weights as kernel
from headwater.lens.attention import module_hooks
from headwater.lens.attention.context import Lowered
from headwater.lens.edits.base import ANY, SHARE, HeadWise, LayerCall, ModuleHook, Prepared, Rows
from headwater.lens.edits.named_positions import NO_GROUPS
from headwater.lens.errors import EditError
from headwater.lens.models import blocks
from headwater.lens.models.opened import Opened
from headwater.lens.naming.heads import Heads, Layers
from headwater.lens.naming.positions import Positions
from headwater.lens.records import sinks
from headwater.lens.running import ids

__all__ = ["RedistributeMassive"]

# the stream entering the layer that runs now; a context variable, so that threads do not mix
_entering: ContextVar[Tensor | None] = ContextVar("headwater_entering", default=None)


@dataclass(frozen=True, eq=False)
class RedistributeMassive(
    HeadWise, numbers={"keep": SHARE, "tau": ANY, "most": ANY, "least": ANY}, neutral={"keep": 1}
):
    """Multiply the weights on massive tokens by `keep`; the freed weight goes to the image's other tokens.

    A token of the prompt is massive in a layer if max over `dimensions` of |x_d| / sqrt(mean x² + 1e-6) > `tau`, where
    x is the stream entering the layer in this very run. A row behind the image is changed if Σ(massive tokens of the
    image) / (Σ(image) + 1e-6) ≤ `most` and Σ(image) ≥ `least`, with the weights of this run too; nothing changes where
    no token of the image is massive. While text is generated, the massive tokens stay those of the prompt. 1 changes
    nothing.

    >>> import headwater as hw
    >>> from headwater.lens.loading import zoo
    >>> model = hw.load(zoo.build("llava"))  # random weights
    >>> prompt = zoo.inputs("llava", lengths=(11,))  # input_ids, attention_mask, pixel_values
    >>> edit = hw.RedistributeMassive([0], keep=0.0, tau=0.5, most=1.0, least=0.0, layers=[1])
    >>> with model.edit(edit):
    ...     weights = model.record(**prompt).pattern(1)[0, 0, -1, 2:]  # the image's nine tokens stand at 2 to 10
    >>> bool((weights == 0).any()), round(float(weights.sum()), 2) <= 1.0
    (True, True)
    """

    dimensions: Sequence[int]
    keep: float = 0.6
    tau: float = 20.0
    most: float = 0.5
    least: float = 0.2
    image: Positions = "image"
    heads: Heads = "all"
    layers: Layers = "all"
    rows: Rows = "all"
    reads_tokens = True  # so that running/ids.py clears `memory` when a new run begins

    def named_positions(self) -> list[Positions]:
        return [self.image]

    def prepare(self, model: Opened, groups: Mapping[str, Any] = NO_GROUPS) -> Prepared:
        if model.parts[model.part_name].crosses:
            raise EditError("RedistributeMassive reads one stream of tokens, and cross-attention has two")
        check_dimensions(self.dimensions, model.d_model)
        prepared = super().prepare(model, groups)
        hooks = [ModuleHook(blocks.block(model, layer).module, _note_stream) for layer in prepared.heads]
        return replace(prepared, hooks=tuple(hooks))

    def _lower(self, call: LayerCall) -> Lowered:
        image, mask = call.keys(self.image), call.mask
        keys = self._massive(call) & call.keys("all")
        visual = keys & image
        keys = keys & visual.any(-1, keepdim=True)
        place = torch.arange(mask.keys) + mask.key_offset
        last = torch.where(image, place, -1).amax(-1, keepdim=True)
        behind = (torch.arange(mask.queries) + mask.query_offset > last)[:, None]
        condition = kernel.RowCondition(visual, image, float(self.most), float(self.least))
        move = kernel.Rescale(call.heads, keys, image & ~keys, float(self.keep), behind, condition)
        return Lowered(weights=(move,))

    def _massive(self, call: LayerCall) -> Tensor:
        """The massive tokens of the prompt as keys of this call, bool [batch, key]."""
        mask, memory = call.mask, ids.current(call.names.model.key).memory
        slot = ("massive", id(self), call.layer)
        if not mask.query_offset:
            stream = _entering.get()
            if stream is None or stream.shape[1] != mask.queries:
                raise EditError(f"RedistributeMassive: the stream entering layer {call.layer} is not known")
            memory[slot] = (sinks.massive(stream.detach(), self.dimensions) > self.tau).cpu()
        elif slot not in memory:
            raise EditError(
                "RedistributeMassive: this run goes on from a cache that was filled without it; begin with the prompt"
            )
        found = memory[slot][:, mask.key_offset : mask.key_offset + mask.keys]
        return torch.nn.functional.pad(found, (0, mask.keys - found.shape[1]))


def check_dimensions(given: object, d_model: int) -> None:
    """EditError unless these are numbers of dimensions of a stream."""
    listed = given if isinstance(given, Sequence) else []
    if not listed or not all(isinstance(d, int) and 0 <= d < d_model for d in listed):
        raise EditError(f"dimensions are numbers from 0 to {d_model - 1}, one or more; got {given!r:.60}")


def _note_stream(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    _entering.set(module_hooks.hidden_states(args, kwargs))
