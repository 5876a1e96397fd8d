"""Edits of the head outputs z before the output projection: scale, add an offset, or replace."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from headwater.kernels.edits import outputs as kernel
from headwater.kernels.tiles.mask import Mask
from headwater.lens.attention.context import Lowered
from headwater.lens.edits.base import Edit, HeadWise, LayerCall, Prepared, Rows, batch_rows, number, vectors
from headwater.lens.edits.named_positions import NO_GROUPS, Names
from headwater.lens.errors import EditError
from headwater.lens.models import inputs
from headwater.lens.models.opened import Opened
from headwater.lens.naming.heads import Head, Heads, Layers, chosen
from headwater.lens.running.forward import outputs_by_layer

__all__ = ["AblateHeads", "OffsetHeads", "ScaleHeads"]

Ablation = Literal["zero", "mean", "resample"]


@dataclass(frozen=True, eq=False)
class ScaleHeads(Edit):
    """z → factor·z per head, before the output projection; `{"2.3": 0.0}` switches head 2.3 off.

    >>> import headwater as hw
    >>> model = hw.load("tasks-4l")
    >>> with model.edit(hw.ScaleHeads({"2.0": 0.0, "2.6": 0.0})):
    ...     z = model.head_outputs("Mary gave John a drink")  # [batch, layer, head, position, d_head]
    >>> [head for head in range(8) if not z[0, 2, head].any()]
    [0, 6]
    """

    factors: Mapping[str | Head, float]
    rows: Rows = "all"

    def prepare(self, model: Opened, groups: Mapping[str, Any] = NO_GROUPS) -> Prepared:
        if not isinstance(self.factors, Mapping):
            raise EditError(f"ScaleHeads takes a mapping such as {{'2.3': 0.0}}; got {self.factors!r}")
        for factor in self.factors.values():
            number(factor, "a factor", "ScaleHeads")
        changed = {head: float(f) for head, f in self.factors.items() if f != 1}
        chosen(list(self.factors), "all", model.layers, model.n_heads)  # names every head that does not exist
        masks = chosen(list(changed), "all", model.layers, model.n_heads) if changed else {}
        gates = {layer: torch.ones(1, model.n_heads) for layer in masks}
        for head, factor in changed.items():
            layer, index = Head.parse(head)
            gates[layer][0, index] *= factor
        return Prepared(self, masks, Names(model, groups), gates, batch_rows(self.rows, "ScaleHeads"))

    def _lower(self, call: LayerCall) -> Lowered:
        return Lowered(outputs=(kernel.Gate(torch.where(call.heads, call.values, 1.0)),))


@dataclass(frozen=True, eq=False)
class OffsetHeads(Edit):
    """z → z + v per head, before the output projection: `{"5.1": v}` with v [d_head] or [position, d_head].

    The positions of v count from the first real token; after the last of them nothing is added. Zeros change nothing.
    LoFiT (Yin et al. 2024) learns offsets [d_head].

    >>> import headwater as hw
    >>> model = hw.load("tasks-4l")
    >>> plain = model.head_outputs("Mary gave John a drink")
    >>> with model.edit(hw.OffsetHeads({"2.0": [1.0] * model.d_head})):
    ...     (model.head_outputs("Mary gave John a drink") - plain)[0, 2, 0].mean().round(decimals=2)
    tensor(1.)
    """

    offsets: Mapping[str | Head, Any]
    rows: Rows = "all"

    def prepare(self, model: Opened, groups: Mapping[str, Any] = NO_GROUPS) -> Prepared:
        if not isinstance(self.offsets, Mapping):
            raise EditError(f"OffsetHeads takes a mapping such as {{'5.1': vector}}; got {self.offsets!r}")
        chosen(list(self.offsets), "all", model.layers, model.n_heads)
        offsets = {
            head: vectors(v, model.shape(head.layer).d_value, f"OffsetHeads: the offset of head {head}")
            for head, v in ((Head.parse(h), v) for h, v in self.offsets.items())
        }
        moved = {head: v for head, v in offsets.items() if v.any()}
        masks = chosen(list(moved), "all", model.layers, model.n_heads)
        values = {layer: {h.head: v for h, v in moved.items() if h.layer == layer} for layer in masks}
        return Prepared(self, masks, Names(model, groups), values, batch_rows(self.rows, "OffsetHeads"))

    def _lower(self, call: LayerCall) -> Lowered:
        start, stop = call.mask.real("query")
        length = int((stop - start).max()) if any(v.dim() == 2 for v in call.values.values()) else 1
        width = next(iter(call.values.values())).shape[-1]
        values = torch.zeros(1, call.heads.shape[1], length, width)
        for head, offset in call.values.items():
            moved = offset if offset.dim() == 1 else offset[:length]
            values[0, head, : len(moved) if moved.dim() == 2 else length] = moved
        return Lowered(outputs=(kernel.OffsetOutput(call.heads, values),))


@dataclass(frozen=True, eq=False)
class AblateHeads(HeadWise):
    """Replace the head outputs z: `ablation` is "zero", "mean" or "resample".

    "mean": the head's mean of z over all real tokens of `examples` (texts or token ids). "resample": z at the same
    position of one of the `examples`, drawn for each batch row with `seed`. Both run the unedited model.

    >>> import headwater as hw
    >>> model = hw.load("tasks-4l")
    >>> with model.edit(hw.AblateHeads("2.0", "mean", examples=["Mary gave John a drink", "John went to the store"])):
    ...     z = model.head_outputs("Mary gave John a drink")[0, 2, 0]
    >>> bool((z == z[0]).all())  # the same mean at every position
    True
    """

    renamed: ClassVar[Mapping[str, str]] = {"how": "ablation"}
    heads: Heads
    ablation: Ablation = "zero"
    examples: Any = None
    seed: int = 0
    layers: Layers = "all"
    rows: Rows = "all"

    def _check(self) -> None:
        if self.ablation not in get_args(Ablation):
            raise EditError(
                f"AblateHeads: ablation must be 'zero', 'mean' or 'resample'; got {self.ablation!r}"
            )
        if self.ablation != "zero" and self.examples is None:
            raise EditError(
                f"AblateHeads(ablation={self.ablation!r}) needs examples=, texts or token ids to take the outputs from"
            )

    def prepare(self, model: Opened, groups: Mapping[str, Any] = NO_GROUPS) -> Prepared:
        prepared = super().prepare(model, groups)
        if self.ablation == "zero" or not prepared.heads:
            return prepared
        tokens = inputs.read(model, self.examples)
        outputs = outputs_by_layer(model, tokens, edited=False)  # [example, head, position, d_head]
        values = {}
        for layer in prepared.heads:
            z = outputs[layer]
            if self.ablation == "mean":
                real = tokens.mask[:, None, :, None].to(z)
                values[layer] = ((z * real).sum((0, 2)) / real.sum((0, 2)))[None, :, None]
            else:
                values[layer] = z.masked_fill(~tokens.mask[:, None, :, None].to(z.device), torch.nan)
        return replace(prepared, values=values)

    def _lower(self, call: LayerCall) -> Lowered:
        if self.ablation == "zero":
            return Lowered(outputs=(kernel.Gate((~call.heads).float()),))
        values = self._drawn(call.values, call.mask) if self.ablation == "resample" else call.values
        return Lowered(outputs=(kernel.ReplaceOutput(call.heads, values),))

    def _drawn(self, values: Tensor, mask: Mask) -> Tensor:
        start, stop = mask.real("query")
        longest = int((stop - start).max())
        lengths = values[:, 0, :, 0].isfinite().sum(-1)
        enough = (lengths >= longest).nonzero()[:, 0]
        if not len(enough):
            raise EditError(
                f"AblateHeads(ablation='resample'): position {longest - 1} is needed but the longest example has "
                f"{int(lengths.max())} tokens; give longer examples"
            )
        generator = torch.Generator().manual_seed(self.seed)
        return values[enough[torch.randperm(len(enough), generator=generator)]].nan_to_num(0.0)
