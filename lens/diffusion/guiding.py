"""`Guiding`: moves the picture of a sampling run against the slope of a loss over the attention of its denoiser.

Before a step the denoiser runs once more, on the conditional rows and with gradients; x ← x − rate · ∂loss/∂x. So do
Attend-and-Excite, A-STAR, Bounded Attention and Attention Refocusing, each with its loss (lens/losses/).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from headwater.lens.diffusion.branches import LATENTS
from headwater.lens.edits.base import number
from headwater.lens.errors import EditError, ModelError
from headwater.lens.records.record import Record

Loss = Callable[[Record], Tensor]
ALIKE = (
    1e-3  # how far the picture of the scheduler may be from a multiple of that of the denoiser, of its size
)


@dataclass(eq=False)
class Guiding:
    """What moves the picture, and what it did: `losses` are by step the loss [picture] before each move."""

    loss: Loss
    rate: float | Callable[[int], float]
    steps: frozenset[int] | None
    times: int
    least: float
    losses: dict[int, list[Tensor]] = field(default_factory=dict)
    moved: dict[int, float] = field(default_factory=dict)
    _shift: tuple[int, Tensor, Tensor] | None = None  # the step, the picture that was given, and its change

    def acts(self, step: int) -> bool:
        return self.steps is None or step in self.steps

    def find(self, step: int, given: Tensor, record: Callable[[Tensor], Record]) -> None:
        """Move the conditional picture of a step; `record` runs the denoiser on a picture, with gradients."""
        rate = (
            number(self.rate(step), f"rate of step {step}", "guiding") if callable(self.rate) else self.rate
        )
        picture, told = given.detach().clone(), []
        with torch.enable_grad():
            for _ in range(self.times):
                picture.requires_grad_()
                loss = self.loss(record(picture))
                if not isinstance(loss, Tensor) or not loss.requires_grad or loss.dim() > 1:
                    raise EditError(
                        "the loss of a guided run is a tensor [picture] computed from record.pattern(…), so that it "
                        f"carries a gradient; got {type(loss).__name__}"
                    )
                if loss.numel() not in (1, len(picture)):
                    raise EditError(
                        f"the loss of a guided run has one number per picture, {len(picture)}; got {loss.numel()}"
                    )
                told.append(loss.detach().reshape(-1).cpu())
                (slope,) = torch.autograd.grad(loss.sum(), picture)
                going = (loss.detach() > self.least).reshape(-1, *[1] * (picture.dim() - 1))
                picture = (picture - rate * slope * going).detach()
        if not picture.isfinite().all():
            raise EditError(f"the picture is not finite after step {step}; take a smaller rate than {rate:g}")
        self.losses[step], self.moved[step] = told, float((picture - given).norm() / given.norm())
        self._shift = (step, given, picture - given)

    def shift(self, step: int) -> Tensor | None:
        """The change of the picture of a step; None where it was not moved."""
        return self._shift[2] if self._shift is not None and self._shift[0] == step else None

    def follow(self, scheduler: Any, sample: Tensor) -> Tensor:
        """The picture from which the scheduler goes on, moved as that of the denoiser was."""
        if self._shift is None:
            return sample
        _, given, change = self._shift
        self._shift = None
        if sample.shape == given.shape:
            # schedulers may scale the picture for the denoiser
            factor = (sample * given).sum() / (given * given).sum()
            if (sample - factor * given).norm() <= ALIKE * sample.norm():
                return sample + factor * change.to(sample)
        raise ModelError(
            f"the picture that {type(scheduler).__name__} steps from is not the one that the denoiser read, so a "
            "guided run can not move it; move it in a loop of your own, by the slope of model.record(…, grad=True)"
        )


_guiding: ContextVar[Guiding | None] = ContextVar("headwater_guiding", default=None)


def guiding_of(
    loss: Loss, rate: float | Callable[[int], float], steps: Iterable[int] | None, times: int, least: float
) -> Guiding:
    """A `Guiding` of checked settings."""
    if not callable(loss):
        raise EditError(f"loss is a function of a record that gives [picture]; got {type(loss).__name__}")
    if not callable(rate):
        rate = number(rate, "rate", "guiding")
    if isinstance(times, bool) or not isinstance(times, int) or times < 1:
        raise EditError(f"times is a whole number, 1 or more; got {times!r}")
    chosen = None if steps is None else _steps(steps)
    least = number(least, "least", "guiding")
    return Guiding(loss, rate, chosen, times, least)


def _steps(given: Any) -> frozenset[int]:
    found = list(given) if isinstance(given, Iterable) and not isinstance(given, str) else []
    if not found or not all(type(step) is int and step >= 0 for step in found):
        raise EditError(f"steps lists numbers of steps from 0 on, such as range(4); got {given!r:.60}")
    return frozenset(found)


@contextlib.contextmanager
def following(pipeline: Any, guiding: Guiding) -> Iterator[None]:
    """Inside, the pipeline's scheduler goes on from the moved picture, in this context only."""
    scheduler = getattr(pipeline, "scheduler", None)
    if scheduler is None or not hasattr(scheduler, "step"):
        raise ModelError("a guided run needs a pipeline with a scheduler; hw.load(pipeline)")
    own = scheduler.step

    def step(model_output: Any, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        now = _guiding.get()
        sample = sample if now is None else now.follow(scheduler, sample)
        return own(model_output, timestep, sample, *args, **kwargs)

    token = _guiding.set(guiding)
    had = scheduler.__dict__.get("step")
    scheduler.step = step
    try:
        yield
    finally:
        if had is None:
            del scheduler.step
        else:
            scheduler.step = had
        with contextlib.suppress(ValueError):  # ended in another context
            _guiding.reset(token)


def latents_in(arguments: Mapping[str, Any]) -> str:
    """The name of the argument of a denoiser that is the picture."""
    return next(name for name in LATENTS if isinstance(arguments.get(name), Tensor))
