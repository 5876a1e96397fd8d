"""Windows of a picture that a model folds into the batch (Swin, Liu et al. 2021), unfolded into one map of its grid.

A block rolls the grid of patches by its shift, cuts it into windows and attends within each. A hook on the block notes
the grid of the run. The attention function then sees queries, keys and values [batch, head, row · column, d_head] with
the roll undone; the window of each position, and its region where a roll has joined two borders, are the documents of
one mask, so that nothing of positions × positions is built. The bias of relative positions is the same in every window:
the queries carry its row and the keys the place in the window, as features behind their own.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from headwater.kernels.tiles.mask import Mask
from headwater.lens.attention.context import NAME
from headwater.lens.attention.module_hooks import Given, Lasting, stay
from headwater.lens.attention.standing_in import is_replaced
from headwater.lens.errors import ModelError

_current: ContextVar[tuple[nn.Module, Grid | None] | None] = ContextVar("headwater_windows", default=None)
_widths: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()


@dataclass(frozen=True, eq=False)
class Grid:
    """`place` [window, place in the window] is the position in the grid, row by row; `document` [1, position]."""

    place: Tensor
    document: Tensor

    @classmethod
    def of(cls, height: int, width: int, window: int, shift: int) -> Grid:
        grid = torch.arange(height * width).view(height, width).roll((-shift, -shift), (0, 1))
        region = torch.zeros(height, width, dtype=torch.long)
        if shift:
            row, column = (
                (n >= size - window).long() + (n >= size - shift).long()
                for size in (height, width) for n in (torch.arange(size),)
            )  # fmt: skip
            region = row[:, None] * 3 + column
        place, region = (_cut(each, window) for each in (grid, region))
        document = torch.empty(1, height * width, dtype=torch.long)
        document[0, place.flatten()] = (torch.arange(len(place))[:, None] * 9 + region).flatten()
        return cls(place, document)

    @property
    def order(self) -> Tensor:
        """The place, window by window, of each position."""
        return self.place.flatten().argsort()

    def mask(self) -> Mask:
        count = self.place.numel()
        return Mask(count, count, documents=self.document)

    def unfolded(self, x: Tensor) -> Tensor:
        """[batch · window, head, place, d] → [batch, head, position, d]."""
        return (
            x.unflatten(0, (-1, len(self.place))).transpose(1, 2).flatten(2, 3)[:, :, self.order.to(x.device)]
        )

    def folded(self, z: Tensor) -> Tensor:
        """[batch, position, head, d] → [batch · window, place, head, d]."""
        return z[:, self.place.to(z.device)].flatten(0, 1)

    def biased(self, q: Tensor, k: Tensor, scale: float, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """Queries and keys whose products are the scores; `bias` [row, head, place, place] begins with the first
        window, which no roll has joined."""
        if bias is None:
            return q * scale, k
        size = self.place.shape[1]
        inside = self.order.to(q.device) % size
        row = bias[0].to(q)[:, inside].expand(len(q), q.shape[1], -1, -1)
        at = torch.eye(size, device=k.device, dtype=k.dtype)[inside].expand(*k.shape[:2], -1, -1)
        return torch.cat([q * scale, row], -1), torch.cat([k, at], -1)


def _cut(grid: Tensor, window: int) -> Tensor:
    """[height, width] → [window, place]."""
    rows, columns = (size // window for size in grid.shape)
    return grid.view(rows, window, columns, window).transpose(1, 2).reshape(-1, window * window)


@lru_cache(64)
def _grid(height: int, width: int, window: int, shift: int) -> Grid:
    return Grid.of(height, width, window, shift)


def unfold_windows(modules: Iterable[nn.Module]) -> None:
    """Note the grids of all blocks with windows among the modules."""
    stay([module for module in modules if _has_windows(module)], _Noted())


def grid(module: nn.Module, q: Tensor, opened: bool) -> Grid | None:
    """The grid of a call of an attention module with queries [batch · window, head, place, d]; None where it has no
    windows. ModelError where an `opened` module is given a picture that its windows do not fill."""
    found = _current.get()
    if found is None or not any(inner is module for inner in found[0].modules()):
        return None
    if found[1] is not None and q.shape[2] == found[1].place.shape[1]:
        _widths[module] = q.shape[3]
        return found[1]
    if not opened:
        return None
    raise ModelError(
        f"the windows of {type(found[0]).__name__} do not fill this picture's grid of patches; give pictures of the "
        "size that the model was trained on"
    )


def head_width(module: nn.Module) -> int | None:
    """Features of a head's queries without those that carry the bias; None for a module without windows."""
    return _widths.get(module)


def block_around(hf: nn.Module, module: nn.Module) -> nn.Module | None:
    """The block that cuts the windows of an attention module; None for a module without windows."""
    around = (block for block in hf.modules() if _has_windows(block))
    return next((block for block in around if any(inner is module for inner in block.modules())), None)


def _has_windows(module: nn.Module) -> bool:
    return all(hasattr(module, n) for n in ("window_size", "shift_size")) and (
        "input_dimensions" in inspect.signature(module.forward).parameters
    )


def _is_ours(module: nn.Module) -> bool:
    """Whether a module runs Headwater's attention function now."""
    config = getattr(module, "config", None)
    return getattr(config, "_attn_implementation", None) == NAME or is_replaced(module)


class _Noted(Lasting):
    """The hook; it does nothing while the block runs another attention function."""

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Given | None:
        _current.set(None)
        if not any(_is_ours(inner) for inner in module.modules()):
            return None
        takes = inspect.signature(module.forward)
        given = takes.bind(*args, **kwargs).arguments
        height, width = map(int, given["input_dimensions"])
        window, shift = int(module.window_size), int(module.shift_size)
        shrinks = "always_partition" in takes.parameters and not given.get("always_partition")
        if shrinks and min(height, width) <= window:
            window, shift = min(height, width), 0
        full = height % window == 0 and width % window == 0
        _current.set((module, _grid(height, width, window, shift) if full else None))
        return None
