"""`Samples`: a few numbers of every tensor of a model, by which what torch does not count as a change is noticed.

Of a matrix some number of every row is looked at, each row's in another column, up to `MOST` numbers of a tensor; small
tensors are looked at whole. Nothing of the tensors is held. Cost: one read from memory for each number.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from headwater.kernels.threads import mapped

MOST = 4096  # numbers of a tensor that are looked at
LEAST = 512  # of one that has more
PARTS = 2
PLAIN = (Tensor, nn.Parameter)
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # compared as such, as NaN is no NaN
Kind = tuple[torch.device, torch.dtype]


@dataclass(frozen=True, eq=False)
class Samples:
    """`names` of the tensors of one kind with how many numbers each gave, and the bits of all of these."""

    names: dict[Kind, dict[str, int]]
    found: dict[Kind, Tensor]

    @classmethod
    def of(cls, named: Iterable[tuple[str, Any]]) -> Samples:
        """Of all tensors among the values; of one that is quantised or of other strides nothing is looked at."""
        names: dict[Kind, dict[str, int]] = {}
        views: dict[Kind, list[Tensor]] = {}
        with torch.no_grad():
            for name, value in named:
                if isinstance(value, Tensor) and (view := _view(value)) is not None:
                    kind = (view.device, view.dtype)
                    names.setdefault(kind, {})[name] = view.numel()
                    views.setdefault(kind, []).append(view)
            return cls(names, {kind: _joined(some, kind[0]) for kind, some in views.items()})

    def other_than(self, before: Samples | None) -> set[str]:
        """The names of the tensors of which a number is another one than before, or of which none was known."""
        moved: set[str] = set()
        if before is None:
            return {name for names in self.names.values() for name in names}
        for kind, names in self.names.items():
            known = before.names.get(kind, {})
            if names != known or not torch.equal(self.found[kind], before.found[kind]):
                now, then = self._each(kind), before._each(kind) if known else {}
                moved |= {
                    name for name in names if name not in then or not torch.equal(now[name], then[name])
                }
        return moved

    def _each(self, kind: Kind) -> dict[str, Tensor]:
        found = self.found[kind]
        sizes = [count * kind[1].itemsize // found.itemsize for count in self.names[kind].values()]
        return dict(zip(self.names[kind], found.split(sizes), strict=True))


def _joined(views: list[Tensor], device: torch.device) -> Tensor:
    """The bits of all of them, on the CPU; a part of them for each thread, as they come one by one from memory."""
    size = -(-len(views) // PARTS)
    parts = [views[n : n + size] for n in range(0, len(views), size)]
    found = torch.cat(list(mapped(torch.cat, parts, device))).cpu()
    return found.view(BITS[min(found.itemsize, 8)])


def _view(tensor: Tensor) -> Tensor | None:
    """The numbers of a tensor that are looked at."""
    count = tensor.numel()
    if not count or tensor.is_quantized or not tensor.is_contiguous():
        return None
    step = 1 if count <= MOST else _step(count, tensor.shape[-1] if tensor.dim() > 1 else 1)
    plain = type(tensor) in PLAIN
    if plain and step == 1 and tensor.dim() == 1 and tensor.itemsize > 1:
        return tensor
    flat = (
        torch.as_strided(tensor, (-(-count // step),), (step,)) if plain else tensor.detach().view(-1)[::step]
    )
    return flat.view(torch.uint8) if flat.itemsize == 1 else flat


@functools.lru_cache(1024)
def _step(count: int, width: int) -> int:
    """How far the numbers that are looked at stand apart in a tensor of so many, in rows of `width`."""
    step = count // min(max(count // width, LEAST), MOST)
    while step > 1 and math.gcd(step, width) > 1:  # so that one row after another gives another column
        step -= 1
    return max(step, 1)
