"""`NamedAxes`: what a user calls the axes of a part and the tokens on them.

The query axis is named first, the key axis second; self-attention has one. Tokens are called by a list of names, or
stand on a grid (rows, columns) or (frames, rows, columns). Tokens before a grid, such as a class token, keep numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any, Protocol, TypeGuard

from headwater.lens.errors import ModelError, nearest
from headwater.lens.models.parts import Part
from headwater.lens.naming.grids import Grid
from headwater.lens.naming.measured import Labelled, Measured

Names = Sequence[str] | tuple[int, int] | tuple[int, int, int] | None
SIDES = ("queries", "keys")


class AxisNames(Protocol):
    """What tells the names of tokens."""

    def labels(self, measured: Measured) -> Iterator[tuple[tuple[str, str], Labelled]]:
        """(part, "queries" or "keys") with the names of its tokens, for the axes that have some."""
        ...


class NamedAxes:
    """`of(part, side)` gives the names of an axis, in `{"self": {"image": (8, 8)}, "cross": {"image": (8, 8), "words":
    ["a", "cat"]}}`. ModelError for names that are none."""

    def __init__(self, given: Any, parts: Mapping[str, Part]) -> None:
        self._names: dict[tuple[str, str], Names] = {}
        self.axes: dict[str, tuple[str, str]] = {}
        form = "give {part: {axis: names or (rows, columns)}}"
        if not isinstance(given, Mapping):
            raise ModelError(f"axes={given!r:.60} can not be read; {form}")
        for part, axes in given.items():
            if part not in parts:
                raise ModelError(f"axes names no part {part!r:.40}: {nearest(part, parts)}")
            own = parts[part]
            if not isinstance(axes, Mapping) or len(axes) != (2 if own.crosses else 1):
                wanted = "two axes, of its queries and of its keys" if own.crosses else "one axis"
                raise ModelError(f"axes: the part {part!r} has {wanted}, got {axes!r:.60}; {form}")
            named = [str(name) for name in axes]
            self.axes[part] = (named[0], named[-1])
            for side, names in zip(SIDES, list(axes.values()) * (1 if own.crosses else 2), strict=True):
                self._names[part, side] = _checked(part, names)

    def fit(self, measured: Measured) -> None:
        """ModelError where names are not as many as the tokens of these inputs."""
        for (part, side), names in self._names.items():
            count = measured.axes[part, side].shape[1]
            wanted = count if names is None else prod(names) if _is_grid(names) else len(names)
            if wanted > count or (wanted < count and not _is_grid(names)):
                raise ModelError(
                    f"axes: the {side} of {part!r} are {count} tokens on the sample, and {names!r:.60} names {wanted}"
                )

    def renamed(self, parts: Mapping[str, Part]) -> dict[str, Part]:
        """The parts with their axes' names."""
        return {
            name: replace(part, queries=self.axes[name][0], keys=self.axes[name][1])
            if name in self.axes
            else part
            for name, part in parts.items()
        }

    def labels(self, measured: Measured) -> Iterator[tuple[tuple[str, str], Labelled]]:
        """The names of the tokens of each axis that has as many as were named."""
        for key, names in self._names.items():
            count = measured.axes[key].shape[1] if key in measured.axes else 0
            if names is None or not count:
                continue
            if _is_grid(names):
                frames, rows, columns = (1, *names)[-3:]
                before = count - frames * rows * columns
                grid = Grid(before, frames, rows, columns, columns)
                if before >= 0:
                    yield key, Labelled([f"#{n}" for n in range(before)] + grid.names(), grid)
            elif len(names) == count:
                yield key, Labelled(list(map(str, names)), None)


def _is_grid(names: Any) -> TypeGuard[tuple[int, ...]]:
    return isinstance(names, tuple) and all(isinstance(n, int) for n in names)


def _checked(part: str, names: Any) -> Names:
    whole = _is_grid(names) and len(names) in (2, 3) and min(names) > 0
    listed = (
        isinstance(names, list | tuple) and len(names) > 0 and all(isinstance(name, str) for name in names)
    )
    if names is not None and not whole and not listed:
        raise ModelError(
            f"axes: the tokens of {part!r} are called by a list of texts, or stand on a grid (rows, columns) or "
            f"(frames, rows, columns); got {names!r:.60}"
        )
    return names  # type: ignore[return-value]
