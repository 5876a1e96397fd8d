"""Where a denoiser stands in a sampling run: the step, the timestep, and the branches of guidance in its batch."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass

CONDITIONAL, UNCONDITIONAL, PERTURBED = BRANCHES = ("conditional", "unconditional", "perturbed")


@dataclass(frozen=True)
class Now:
    """One call of a denoiser: its `step` counts from 0; `branches` are those in this batch, in the order of its rows,
    each with as many rows as the others; `known` are all that the run may have."""

    step: int
    timestep: float
    branches: tuple[str, ...]
    known: tuple[str, ...]

    def rows(self, branch: str, batch: int) -> range:
        """The rows of a branch, of `batch` rows."""
        size = batch // len(self.branches)
        first = self.branches.index(branch) * size
        return range(first, first + size)


_now: ContextVar[Now | None] = ContextVar("headwater_denoising", default=None)


def now() -> Now | None:
    """The call of a denoiser that runs in this context."""
    return _now.get()


def stand(at: Now | None) -> None:
    """A call begins, or is over (None)."""
    _now.set(at)
