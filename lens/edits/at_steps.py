"""`AtSteps`: an edit that acts at some steps of a diffusion model's sampling, and on one branch of its guidance."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from headwater.kernels.tiles.mask import Mask
from headwater.lens.attention.context import Lowered
from headwater.lens.edits.base import Edit, Prepared, plain
from headwater.lens.edits.named_positions import NO_GROUPS
from headwater.lens.errors import EditError, nearest
from headwater.lens.models.opened import Opened
from headwater.lens.naming.positions import Positions
from headwater.lens.running import denoising

__all__ = ["AtSteps"]


@dataclass(frozen=True, eq=False)
class AtSteps(Edit):
    """Another edit, at some steps and on one branch alone.

    `of` is the edit. `steps` are "all", a step, a list of steps, or a slice such as slice(0, 10); steps count from 0,
    the noisiest. `branch` is "conditional" or "unconditional" (classifier-free guidance), "perturbed", or "all"; `rows`
    of the edit count within it. EditError outside of a sampling run of a diffusion model.

    >>> import headwater as hw
    >>> hw.AtSteps(hw.ScaleHeads({"0.1": 0.0}), steps=slice(0, 10), branch="conditional").to_dict()["branch"]
    'conditional'
    """

    of: Edit
    steps: str | int | slice | Iterable[int] = "all"
    branch: str = "all"

    def __post_init__(self) -> None:
        if isinstance(self.of, AtSteps) or not isinstance(self.of, Edit):
            raise EditError(f"AtSteps: of= is an edit such as hw.ScaleHeads(…); got {self.of!r:.60}")
        if isinstance(self.steps, Iterable) and not isinstance(self.steps, str):
            object.__setattr__(self, "steps", list(self.steps))
        given = self.steps
        numbers = [given.start or 0, given.stop or 0] if isinstance(given, slice) else given
        numbers = numbers if isinstance(numbers, list) else [] if numbers == "all" else [numbers]
        if wrong := [n for n in numbers if isinstance(n, bool) or not isinstance(n, int) or n < 0]:
            raise EditError(
                f"AtSteps: steps are 'all', a number from 0 on, a list or a slice of them; got {wrong[0]!r:.40}"
            )
        if not isinstance(self.branch, str):
            raise EditError(f"AtSteps: branch is 'all' or the name of a branch; got {self.branch!r:.40}")

    @property
    def own_position(self) -> bool:  # type: ignore[override]
        return self.of.own_position

    @property
    def row_sums(self) -> str:  # type: ignore[override]
        return self.of.row_sums

    def at(self, step: int) -> bool:
        """Whether the edit acts at this step."""
        if isinstance(self.steps, slice):
            return step in range(*self.steps.indices(step + 1))
        return self.steps == "all" or step in (self.steps if isinstance(self.steps, list) else [self.steps])

    def prepare(self, model: Opened, groups: Mapping[str, Any] = NO_GROUPS) -> Prepared:
        inner = self.of.prepare(model, groups)
        name = type(self.of).__name__
        if inner.hooks:
            raise EditError(f"AtSteps: {name} changes modules and not attention, which AtSteps can not limit")
        if inner.sink_rules():
            raise EditError(f"AtSteps: {name} names sinks, which differ at each step; give positions")
        return _AtSteps(self, inner.heads, inner.names, inner=inner)

    def named_positions(self) -> list[Positions]:
        return self.of.named_positions()

    def to_python(self) -> str:
        steps = self.steps if isinstance(self.steps, slice) else plain(self.steps)
        told = [self.of.to_python()]
        told += [] if self.steps == "all" else [f"steps={steps!r}"]
        told += [] if self.branch == "all" else [f"branch={self.branch!r}"]
        return f"hw.AtSteps({', '.join(told)})"

    def _plain(self, field: str) -> Any:
        return self.of.to_dict() if field == "of" else super()._plain(field)


@dataclass(frozen=True, eq=False)
class _AtSteps(Prepared):
    """The prepared edit with its limits."""

    inner: Prepared = None  # type: ignore[assignment]

    def lower(self, layer: int, mask: Mask, batch: int) -> Lowered:
        edit, now = self.edit, denoising.now()
        assert isinstance(edit, AtSteps)
        if now is None:
            raise EditError(
                "AtSteps acts in a sampling run of a diffusion model; run the pipeline or the denoiser itself"
            )
        if edit.branch not in ("all", *now.known):
            raise EditError(
                f"AtSteps: this run has no branch {edit.branch!r}: {nearest(edit.branch, now.known)}"
            )
        if not edit.at(now.step) or edit.branch not in ("all", *now.branches):
            return Lowered()
        if edit.branch == "all":
            return self.inner.lower(layer, mask, batch)
        rows = now.rows(edit.branch, batch)
        own = self.inner.rows
        if own is not None and (wrong := [n for n in own if not -len(rows) <= n < len(rows)]):
            raise EditError(
                f"{type(edit.of).__name__}: no row {wrong[0]} among the {len(rows)} of the branch {edit.branch!r}"
            )
        some = tuple(rows) if own is None else tuple(rows[n] for n in own)
        return dataclasses.replace(self.inner, rows=some).lower(layer, mask, batch)
