"""Edits of the residual stream and of the output of an MLP, by forward hooks for the time of the `with` block.

Places in a layer: "pre", the input of the block; "mid", the stream between attention and MLP; "post", the output of the
block. The hooks act only in the caller's context. "mid" and MLP edits are first checked on three tokens: they are
refused where attention output + MLP output is not the change of the stream, as in post-norm blocks (BERT), and "mid"
also where attention and MLP run in parallel.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from headwater.kernels.tiles.mask import Mask
from headwater.lens.attention import context, module_hooks, shortening
from headwater.lens.attention.masks import LazyMask
from headwater.lens.edits.base import Edit, ModuleHook, Prepared, Rows, batch_rows, vectors
from headwater.lens.edits.named_positions import NO_GROUPS, Names
from headwater.lens.errors import EditError
from headwater.lens.models import blocks
from headwater.lens.models.blocks import TransformerBlock
from headwater.lens.models.opened import Opened
from headwater.lens.naming import positions
from headwater.lens.naming.heads import chosen_layers
from headwater.lens.naming.positions import Positions
from headwater.lens.running.short_input import short_input
from headwater.lens.running.watching import watching

__all__ = ["EditMLP", "EditResidual"]

How = Literal["add", "replace", "project_out", "scale"]
Change = Callable[[Tensor], Tensor]
# inputs of the layer that runs now, which its hooks need: the mask, which places the positions, and the stream at the
# norm before attention, to which "mid" adds the attention's output; context variables, so that threads do not mix
_mask: ContextVar[Mask | None] = ContextVar("headwater_block_mask", default=None)
_stream: ContextVar[Tensor | None] = ContextVar("headwater_stream", default=None)


class _Stream(Edit, ABC):
    """Base of both edits.

    It is not a dataclass, so that each edit can declare these fields in its own order.
    """

    layer: int
    how: How
    vector: Any
    positions: Positions
    rows: Rows

    def prepare(self, model: Opened, groups: Mapping[str, Any] = NO_GROUPS) -> Prepared:
        where = type(self).__name__
        chosen_layers(self.layer, model.layers)
        if self.how not in get_args(How):
            raise EditError(
                f"{where}: how must be 'add', 'replace', 'project_out' or 'scale'; got {self.how!r}"
            )
        one = self.how == "scale" and isinstance(self.vector, int | float)
        vector = vectors(
            [self.vector] * model.d_model if one else self.vector, model.d_model, f"{where}: vector"
        )
        if self.how == "project_out" and (vector.dim() == 2 or not vector.any()):
            raise EditError(
                f"{where}: project_out takes one direction of {model.d_model} numbers, not all zero"
            )
        names = Names(model, groups)
        names.check(self.positions, f"{where}: positions")
        if names.sink_names(positions.check(self.positions, where)):
            raise EditError(f"{where}: sinks belong to heads and can not be named here; give their positions")
        rows = batch_rows(self.rows, where)
        nothing = not vector.any() if self.how == "add" else self.how == "scale" and bool((vector == 1).all())
        nothing = nothing or positions.check(self.positions, where) == ()
        prepared = Prepared(self, {}, names, {self.layer: vector}, rows)
        if nothing:
            return prepared
        block = blocks.block(model, self.layer)
        acting = self._hooks(model, block, functools.partial(self.changed, prepared))
        return replace(prepared, hooks=(ModuleHook(block.module, _note_mask), *acting))

    def named_positions(self) -> list[Positions]:
        return [self.positions]

    @abstractmethod
    def _hooks(self, model: Opened, block: TransformerBlock, change: Change) -> tuple[ModuleHook, ...]:
        """The hooks of the edit; `change` maps a stream [batch, position, d_model] to the edited one."""

    def changed(self, prepared: Prepared, x: Tensor) -> Tensor:
        """x [batch, position, d_model], edited at the chosen rows and positions."""
        vector = prepared.values[self.layer].to(x)
        mask = _mask.get() or Mask(x.shape[1], x.shape[1])
        if mask.queries != x.shape[1]:
            raise EditError(
                f"{type(self).__name__}: layer {self.layer} reads {x.shape[1]} positions, its mask {mask.queries}, so "
                "positions can not be told apart there; edit heads, or another layer"
            )
        if shortening.at_length(prepared.names.model.key, self.layer, x) is not x:
            raise EditError(
                f"{type(self).__name__}: PruneTokens removed tokens before layer {self.layer}, so positions can not be "
                "told apart there; give this edit first, or name an earlier layer"
            )
        start, _ = mask.real("query")
        place = torch.arange(mask.queries)[None] + mask.query_offset - start[:, None]
        acts = prepared.names.select(self.positions, mask, "query", self.layer)
        acts = acts & (place >= 0)
        if vector.dim() == 2:
            acts = acts & (place < len(vector))
            vector = vector[place.clamp(0, len(vector) - 1).to(x.device)]
        acts = acts.expand(len(x), -1)
        if prepared.rows is not None:
            acts = acts & prepared.of_rows(torch.ones(1, dtype=torch.bool), len(x))
        if self.how == "add":
            new = x + vector
        elif self.how == "replace":
            new = vector.expand_as(x)
        elif self.how == "scale":
            new = x * vector
        else:
            unit = vector / vector.norm()
            new = x - (x @ unit)[..., None] * unit
        return torch.where(acts[..., None].to(x.device), new, x)


@dataclass(frozen=True, eq=False)
class EditResidual(_Stream):
    """Change the residual stream x of one layer with a vector v.

    `how`: "add" gives x + v; "replace" v; "project_out" x - (x·u)u with u = v/|v|; "scale" v ⊙ x, where v may be one
    number. `place` is "pre", "mid" or "post" (TransformerLens' resid_pre, resid_mid, resid_post). `vector` is [d_model]
    or [position, d_model], counted from the first real token; later positions are not changed. Adding zeros and scaling
    by 1 change nothing.

    >>> import headwater as hw
    >>> model = hw.load("tasks-4l")
    >>> plain = model.record("Mary gave John a drink", keep=["residual"]).residual(2)
    >>> with model.edit(hw.EditResidual(1, "scale", 2.0, place="post", positions=-1)):
    ...     edited = model.record("Mary gave John a drink", keep=["residual"]).residual(2)
    >>> edited[0, -1].equal(2 * plain[0, -1]), edited[0, :-1].equal(plain[0, :-1])
    (True, True)
    """

    layer: int
    how: How
    vector: Any
    place: Literal["pre", "mid", "post"] = "pre"
    positions: Positions = "all"
    rows: Rows = "all"

    def _hooks(self, model: Opened, block: TransformerBlock, change: Change) -> tuple[ModuleHook, ...]:
        if self.place not in ("pre", "mid", "post"):
            raise EditError(f"EditResidual: place must be 'pre', 'mid' or 'post'; got {self.place!r}")
        if self.place == "mid":
            if not _facts(model, block).mid:
                raise EditError(
                    f"EditResidual: {type(block.module).__name__} has no residual stream between attention and MLP; "
                    "use 'pre' or 'post'"
                )
            assert block.norm1 is not None
            added = _at_output(change if self.how == "add" else functools.partial(_moved, change))
            return ModuleHook(block.norm1, _note_stream), ModuleHook(block.attention_out, after=added)
        if self.place == "post":
            return (ModuleHook(block.module, after=_at_output(change)),)
        return (ModuleHook(block.module, before=_at_input(change)),)


@dataclass(frozen=True, eq=False)
class EditMLP(_Stream):
    """Change the output of one layer's MLP before it is added to the residual stream; settings as in `EditResidual`.

    >>> import headwater as hw
    >>> model = hw.load("tasks-4l")
    >>> plain = model.record("Mary gave John a drink", keep=["residual"]).residual("final")
    >>> with model.edit(hw.EditMLP(3, "scale", 0.0)):
    ...     edited = model.record("Mary gave John a drink", keep=["residual"]).residual("final")
    >>> edited.equal(plain)
    False
    """

    layer: int
    how: How
    vector: Any
    positions: Positions = "all"
    rows: Rows = "all"

    def _hooks(self, model: Opened, block: TransformerBlock, change: Change) -> tuple[ModuleHook, ...]:
        if block.mlp_out is None or not _facts(model, block).mlp:
            raise EditError(
                f"EditMLP: what the MLP of {type(block.module).__name__} adds to the residual stream is not told apart "
                "there; use EditResidual with place='post'"
            )
        return (ModuleHook(block.mlp_out, after=_at_output(change)),)


def _note_mask(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    _mask.set(next((m.mask for m in (*args, *kwargs.values()) if isinstance(m, LazyMask)), None))


def _note_stream(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    _stream.set(module_hooks.hidden_states(args, kwargs))


def _at_input(change: Change) -> module_hooks.Before:
    """A pre-hook that changes the hidden states among the arguments."""
    return lambda _, args, kwargs: module_hooks.with_hidden_states(
        args, kwargs, change(module_hooks.hidden_states(args, kwargs))
    )


def _at_output(change: Change) -> module_hooks.After:
    """A hook that changes the output tensor."""
    return lambda *given: module_hooks.with_first_output(
        given[-1], change(module_hooks.first_output(given[-1]))
    )


def _moved(change: Change, x: Tensor) -> Tensor:
    """The attention output that, in place of x, makes the stream after attention what the edit wants."""
    stream = _stream.get()
    assert stream is not None
    moved = change(stream + x)
    return torch.where(moved == stream + x, x, moved - stream)


@dataclass(frozen=True)
class _Facts:
    mid: bool
    mlp: bool


_known: WeakKeyDictionary[nn.Module, _Facts] = WeakKeyDictionary()


def _facts(model: Opened, block: TransformerBlock) -> _Facts:
    """Whether the outputs of attention and MLP add up to the change of the stream, on a short input."""
    if block.module in _known:
        return _known[block.module]
    modules = block.module, block.norm1, block.attention_out, block.norm2, block.mlp_out
    watched = watching(m for m in modules if m is not None)
    with torch.no_grad(), context.alone(model.key), watched as calls:
        model.hf(**short_input(model, 3))
    seen = {call.module: call for call in calls}
    pre, post = seen[block.module].given, seen[block.module].output
    norm1, attention, norm2, mlp = (None if m is None else seen.get(m) for m in modules[1:])

    def same(total: Tensor, *terms: Tensor) -> bool:
        return torch.allclose(total, sum(terms[1:], terms[0]), atol=1e-4, rtol=1e-3)

    mid = mlp_adds = False
    if attention and norm1 and norm2:
        mid = same(norm2.given, pre, attention.output) and same(norm1.given, pre)
    if attention and mlp:
        mlp_adds = same(post, pre, attention.output, mlp.output)
    found = _Facts(mid, mlp_adds)
    _known[block.module] = found
    return found
