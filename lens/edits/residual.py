"""Edits of the residual stream and of what an MLP adds to it, by forward hooks that are there while the block lasts.

The places of layer l: "pre", where the block reads the stream; "mid", between attention and MLP; "post", where the
block leaves it. The hooks look into the context, so other threads that run the model do not see the edit. "mid" and the
MLP are held against the model on three tokens first, and refused where what attention and MLP add does not make up the
difference (post-norm blocks such as BERT's; "mid" also where both run side by side).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from headwater.kernels.tiles.mask import Mask
from headwater.lens.attention import context
from headwater.lens.attention.masks import LazyMask
from headwater.lens.edits.base import Edit, Prepared, Rows, batch_rows, vectors
from headwater.lens.edits.named_positions import NO_GROUPS, Names
from headwater.lens.errors import EditError
from headwater.lens.models import blocks, inputs
from headwater.lens.models.opened import Opened
from headwater.lens.naming import positions
from headwater.lens.naming.heads import chosen_layers
from headwater.lens.naming.positions import Positions
from headwater.lens.running.forward import forward
from headwater.lens.running.watching import watching

How = Literal["add", "replace", "project_out", "scale"]
# what the layer that runs now was given: its mask, and the stream where the attention's norm reads it
_mask: ContextVar[Mask | None] = ContextVar("headwater_block_mask", default=None)
_stream: ContextVar[Tensor | None] = ContextVar("headwater_stream", default=None)


class _Stream(Edit, ABC):
    """What both edits share: one layer, what is done, a vector, and at which positions of which rows.

    It is no dataclass, so that each edit has these fields in an order of its own.
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
        return prepared if nothing else replace(prepared, hooks=self._hooks(model))

    def named_positions(self) -> list[Positions]:
        return [self.positions]

    @abstractmethod
    def _hooks(self, model: Opened) -> tuple[Hook, ...]: ...

    def changed(self, prepared: Prepared, x: Tensor) -> Tensor:
        """x [batch, position, d_model] with the edit on the chosen rows and positions."""
        vector = prepared.values[self.layer].to(x)
        mask = _mask.get() or Mask(x.shape[1], x.shape[1])
        if mask.queries != x.shape[1]:
            raise EditError(
                f"{type(self).__name__}: layer {self.layer} reads {x.shape[1]} positions, its mask {mask.queries}"
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
    """Change the residual stream at a layer: `how` "add" x + v, "replace" x → v, "project_out" x - (x·u)u, u = v/|v|,
    "scale" v ⊙ x, where v may be one number.

    `place` is "pre", "mid" or "post" (TransformerLens' resid_pre, resid_mid, resid_post). `vector` has d_model
    numbers, or is [position, d_model], counted from the first real token and ending where it ends.
    Adding zeros and scaling by 1 change nothing.

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

    def _hooks(self, model: Opened) -> tuple[Hook, ...]:
        if self.place not in ("pre", "mid", "post"):
            raise EditError(f"EditResidual: place must be 'pre', 'mid' or 'post'; got {self.place!r}")
        block = blocks.block(model, self.layer)
        if self.place == "mid":
            if not _facts(model, self.layer).mid:
                raise EditError(
                    f"EditResidual: {type(block.module).__name__} has no residual stream between attention and MLP; "
                    "use 'pre' or 'post'"
                )
            assert block.norm1 is not None
            return (
                Hook(block.module, "input", _note_mask),
                Hook(block.norm1, "input", _note_stream),
                Hook(block.attention_out, "output", _at_mid),
            )
        note = Hook(block.module, "input", _note_mask)
        return (note, Hook(block.module, "input" if self.place == "pre" else "output", _at_stream))


@dataclass(frozen=True, eq=False)
class EditMLP(_Stream):
    """Change what one layer's MLP adds to the residual stream, as `EditResidual` does with the stream itself.

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

    def _hooks(self, model: Opened) -> tuple[Hook, ...]:
        block = blocks.block(model, self.layer)
        if block.mlp_out is None or not _facts(model, self.layer).mlp:
            raise EditError(
                f"EditMLP: what the MLP of {type(block.module).__name__} adds to the residual stream is not told apart "
                "there; use EditResidual with place='post'"
            )
        return (Hook(block.module, "input", _note_mask), Hook(block.mlp_out, "output", _at_stream))


Act = Callable[[Prepared, Any, Tensor], "Tensor | None"]


@dataclass(frozen=True, eq=False)
class Hook:
    """A function at the input or output of a module: (prepared edit, arguments, tensor) → the tensor in its place."""

    module: nn.Module
    side: Literal["input", "output"]
    act: Act

    def attach(self, prepared: Prepared, key: object) -> Any:
        """Put it on; it acts where the prepared edit is on in the context that runs the model."""
        if self.side == "output":
            after = context.Staying(lambda m, given, out: self._after(prepared, key, out))
            return self.module.register_forward_hook(after)
        before = context.Staying(lambda m, given, named: self._before(prepared, key, given, named), 3)
        return self.module.register_forward_pre_hook(before, with_kwargs=True)

    def _before(self, prepared: Prepared, key: object, given: tuple, named: dict) -> Any:
        if not any(p is prepared for p in context.active(key)):
            return None
        x = given[0] if given else named["hidden_states"]
        new = self.act(prepared, (given, named), x)
        if new is None:
            return None
        return ((new, *given[1:]), named) if given else (given, named | {"hidden_states": new})

    def _after(self, prepared: Prepared, key: object, out: Any) -> Any:
        if not any(p is prepared for p in context.active(key)):
            return None
        new = self.act(prepared, None, out[0] if isinstance(out, tuple) else out)
        return (new, *out[1:]) if isinstance(out, tuple) else new


def _note_mask(prepared: Prepared, given: Any, x: Tensor) -> None:
    found = [m for m in (*given[0], *given[1].values()) if isinstance(m, LazyMask)]
    _mask.set(found[0].mask if found else None)


def _note_stream(prepared: Prepared, given: Any, x: Tensor) -> None:
    _stream.set(x)


def _edit(prepared: Prepared) -> _Stream:
    assert isinstance(prepared.edit, _Stream)
    return prepared.edit


def _at_stream(prepared: Prepared, given: Any, x: Tensor) -> Tensor:
    return _edit(prepared).changed(prepared, x)


def _at_mid(prepared: Prepared, given: Any, x: Tensor) -> Tensor:
    stream = _stream.get()
    assert stream is not None
    edit = _edit(prepared)
    if edit.how == "add":
        return edit.changed(prepared, x)
    # what attention must add for the stream to be as the edit wants it
    moved = edit.changed(prepared, stream + x)
    return torch.where(moved == stream + x, x, moved - stream)


@dataclass(frozen=True)
class _Facts:
    mid: bool
    mlp: bool


_known: WeakKeyDictionary[nn.Module, _Facts] = WeakKeyDictionary()


def _facts(model: Opened, layer: int) -> _Facts:
    """Whether attention and MLP add up to what a block does, seen on three tokens."""
    block = blocks.block(model, layer)
    if block.module in _known:
        return _known[block.module]
    modules = block.module, block.norm1, block.attention_out, block.norm2, block.mlp_out
    with context.alone(model.key), watching(m for m in modules if m is not None) as calls:
        forward(model, inputs.read(model, torch.arange(3)[None] % model.vocab))
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
