"""The rules of `MaskPairs` as a user writes them, checked and made into the kernel's rules."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from headwater.kernels.tiles import pair_rules
from headwater.lens.errors import EditError, nearest
from headwater.lens.models.patches import Patches

MOST_PAIRS = 2**22  # of a mask or a list of blocks that is written out: 4 MB, 2,048 × 2,048 tokens
MOST_CELLS = 2**24
MOST = 2**31 - 1  # of a whole number, so that products of two stay whole numbers of torch
# what each kind takes; a default of None must be given
KINDS: dict[str, dict[str, Any]] = {
    "dilated": {"reach": None, "step": None},
    "windows": {"grid": None, "size": None, "shift": 0, "first": 0},
    "near": {"grid": None, "reach": None, "first": 0},
    "neighbourhood": {"grid": None, "size": None, "step": 1, "first": 0},
    "tree": {"documents": None, "parents": None},
    "blocks": {"size": None, "shown": None},
    "moba": {"size": None, "top": None},
}
LEAST = {"reach": 0, "step": 1, "size": 1, "shift": 0, "first": 0, "top": 1}
Made = Callable[[Tensor], pair_rules.PairRule]  # from the starts of the rows


def settings_of(rule: Mapping[str, Any], patches: Patches | None = None) -> dict[str, Any]:
    """The rule with its defaults, sizes per axis as tuples; EditError for what is missing, unknown or out of range.

    The grid is that of the `patches` where none is given.
    """
    given = dict(rule)
    kind = given.pop("kind", None)
    if not isinstance(kind, str) or kind not in KINDS:
        near = nearest(kind, KINDS) if isinstance(kind, str) else f"it is one of {', '.join(KINDS)}"
        raise EditError(f"MaskPairs: unknown kind {kind!r}: {near}")
    takes = KINDS[kind]
    if unknown := given.keys() - takes.keys():
        raise EditError(f"MaskPairs: {kind} takes {', '.join(takes)}; got {min(unknown)!r}")
    if "grid" in takes and "grid" not in given and patches is not None and not patches.depth:
        given = {"first": patches.prefix, **given, "grid": patches.grid}
    found: dict[str, Any] = {name: given.get(name, default) for name, default in takes.items()}
    if missing := [name for name, value in found.items() if value is None]:
        raise EditError(f"MaskPairs: {kind} needs {', '.join(missing)}")
    if "grid" in found:
        grid = _numbers(found["grid"], "grid", 1)
        if math.prod(grid) > MOST_CELLS:
            raise EditError(f"MaskPairs: a grid has at most {MOST_CELLS} cells; got {grid}")
        found["grid"] = grid
    for name in found.keys() & LEAST.keys():
        axes = len(found["grid"]) if "grid" in found and name != "first" else None
        value = found[name]
        found[name] = _numbers(value, name, LEAST[name], axes) if axes else _whole(value, name)
    if kind == "neighbourhood":
        for size, step, cells in zip(*(found[name] for name in ("size", "step", "grid")), strict=True):
            if size * step > cells:
                raise EditError(
                    f"MaskPairs: a neighbourhood of {size} cells, {step} apart, does not fit into {cells} cells"
                )
    return {"kind": kind, **found}


def _whole(value: Any, name: str, least: int | None = None) -> int:
    least = LEAST[name] if least is None else least
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise EditError(f"MaskPairs: {name} must be a whole number, {least} or more; got {value!r:.60}")
    if value > MOST:
        raise EditError(f"MaskPairs: {name} is at most {MOST}; got {value!s:.20}")
    return value


def _numbers(value: Any, name: str, least: int, axes: int | None = None) -> tuple[int, ...]:
    """One whole number for each axis; a single one stands for all."""
    counts = (axes,) if axes else range(1, 9)
    each: Any = [value] * axes if isinstance(value, int) and axes else value
    if not isinstance(each, Sequence) or isinstance(each, str) or len(each) not in counts:
        wanted = f"one whole number, or {axes} of them" if axes else "the sizes of the axes, 1 to 8 of them"
        raise EditError(f"MaskPairs: {name} is {wanted}; got {value!r}")
    return tuple(_whole(number, name, least) for number in each)


def made_of(settings: dict[str, Any]) -> Made | dict[str, int]:
    """The kernel's rule for checked settings, given the rows' starts; the settings of MoBA, which needs queries too."""
    kind = settings.pop("kind")
    if kind == "moba":
        return settings
    if kind == "dilated":
        return lambda starts: pair_rules.Dilated(starts, settings["reach"], settings["step"])
    if kind == "tree":
        document, below = _tree(settings["documents"], settings["parents"])
        return lambda starts: pair_rules.Tree(starts, document, below)
    if kind == "blocks":
        shown = _shown(settings["shown"])
        return lambda starts: pair_rules.BlockList(starts, settings["size"], shown)
    where = settings["first"], settings["grid"]
    if kind == "windows":
        return lambda starts: pair_rules.Windows(starts, *where, settings["size"], settings["shift"])
    if kind == "near":
        return lambda starts: pair_rules.Near(starts, *where, settings["reach"])
    return lambda starts: pair_rules.Neighbourhood(starts, *where, settings["size"], settings["step"])


def _tree(documents: Any, parents: Any) -> tuple[Tensor, Tensor]:
    """The document of each place and, for every two documents, whether the second is the first or an ancestor."""
    spans = [_numbers(span, "documents", 0) for span in _some(documents, "documents")]
    above = _sequence(parents, "parents")
    if len(above) != len(spans):
        raise EditError(f"MaskPairs: {len(spans)} documents need as many parents; got {len(above)}")
    if len(spans) ** 2 > MOST_PAIRS or any(len(span) != 2 or span[1] > MOST_CELLS for span in spans):
        raise EditError("MaskPairs: documents are at most 2,048 pairs of a begin and an end")
    document = torch.full((max((end for _, end in spans), default=0),), -1)
    below = torch.eye(len(spans), dtype=torch.bool)
    for i, (begin, end) in enumerate(spans):
        if begin >= end or (document[begin:end] >= 0).any():
            raise EditError(f"MaskPairs: documents are [begin, end) and do not overlap; got {[begin, end]}")
        document[begin:end] = i
        if above[i] is not None:
            if _whole(above[i], "parents", 0) >= i:
                raise EditError(
                    f"MaskPairs: the parent of document {i} is an earlier one or None; got {above[i]}"
                )
            below[i] |= below[above[i]]
    return document, below


def _shown(given: Any) -> Tensor:
    rows = [[_whole(n, "shown", 0) for n in _sequence(row, "shown")] for row in _some(given, "shown")]
    width = max((n for row in rows for n in row), default=-1) + 1
    width = max(width, len(rows))
    if width * len(rows) > MOST_PAIRS:
        raise EditError(f"MaskPairs: {len(rows)} × {width} blocks are too many; take larger blocks")
    shown = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        shown[i, row] = True
    return shown


def _sequence(given: Any, name: str) -> Sequence[Any]:
    if not isinstance(given, Sequence) or isinstance(given, str):
        raise EditError(f"MaskPairs: {name} is a list; got {given!r:.60}")
    return given


def _some(given: Any, name: str) -> Sequence[Any]:
    """A list that is not empty."""
    if not len(found := _sequence(given, name)):
        raise EditError(f"MaskPairs: {name} is empty, and the rule would hide nothing; leave the edit out")
    return found


def mask_of(given: Any, heads: int) -> Made:
    """The rule of a mask that is written out."""
    try:
        array = np.asarray(given.detach().cpu() if isinstance(given, Tensor) else given)
    except (TypeError, ValueError):
        array = np.empty(0)
    if array.dtype != bool or array.ndim not in (2, 3) or 0 in array.shape:
        got = f"{array.dtype} {list(array.shape)}" if array.size else f"{type(given).__name__}"
        raise EditError(f"MaskPairs: rule is a mapping with a kind, or a mask, bool [query, key]; got {got}")
    if array.ndim == 3 and len(array) not in (1, heads):
        raise EditError(
            f"MaskPairs: a mask is [query, key] or [{heads} heads, query, key]; got {list(array.shape)}"
        )
    if array.size > MOST_PAIRS:
        raise EditError(
            f"MaskPairs: a mask of {array.size} pairs is too large to write down; give it as a rule"
        )
    shown = torch.from_numpy(array.copy())
    shown = shown[None, None] if shown.dim() == 2 else shown[None]
    return lambda starts: pair_rules.Listed(starts, shown)
