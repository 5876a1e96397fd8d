"""`Watch`: meets every call of a denoiser inside a block, whoever makes it, and counts the steps of a run."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from headwater.lens.attention import context
from headwater.lens.attention.module_hooks import Given
from headwater.lens.diffusion.branches import branches_of, runs_one_by_one
from headwater.lens.diffusion.guiding import Guiding, latents_in
from headwater.lens.diffusion.steps import Steps
from headwater.lens.diffusion.words import Words
from headwater.lens.errors import EditError, ModelError, PromptError, RecordError
from headwater.lens.foreign.arguments import leaves
from headwater.lens.foreign.meeting import Meeting, apart
from headwater.lens.foreign.model import ForeignModel
from headwater.lens.naming.heads import Layers
from headwater.lens.naming.measured import Measured
from headwater.lens.records import destination, plan
from headwater.lens.records.memory import total
from headwater.lens.records.record import Record
from headwater.lens.running import denoising
from headwater.lens.running.denoising import BRANCHES, CONDITIONAL, UNCONDITIONAL, Now
from headwater.lens.running.forward import check_ready

TIMES = ("timestep", "timesteps")
_watches: ContextVar[tuple[Watch, ...]] = ContextVar("headwater_watches", default=())


@dataclass(frozen=True)
class Keeping:
    """What is recorded of each step, and where it goes. `model` is seen from the part that is recorded."""

    model: ForeignModel
    steps: Steps
    statistics: Iterable[str]
    layers: Layers
    maps: str | frozenset[int]
    groups: plan.Groups


@contextlib.contextmanager
def watching(model: Any, branches: Sequence[str] | None) -> Iterator[Watch]:
    """Inside, the calls of the denoiser are met; inside another such block of the same denoiser, by that one."""
    outer = next((watch for watch in _watches.get() if watch.module is model.module), None)
    if outer is not None:
        outer.divided = outer.divided if branches is None else named(branches)
        yield outer
        return
    watch = Watch(model, None if branches is None else named(branches))
    token = _watches.set((*_watches.get(), watch))
    try:
        with watch.acting(), watch.words.reading():
            yield watch
    finally:
        watch.over()
        with contextlib.suppress(ValueError):  # ended in another context
            _watches.reset(token)


def named(branches: Sequence[str]) -> tuple[str, ...]:
    """Names of branches; PromptError for anything else."""
    found = tuple(branches) if isinstance(branches, list | tuple) else ()
    if not found or len(set(found)) < len(found) or not all(isinstance(name, str) for name in found):
        raise PromptError(
            f"branches are names such as ('unconditional', 'conditional'); got {branches!r:.60}"
        )
    return found


class Watch(Meeting):
    """The calls of one denoiser. `divided` names the branches of each batch; None: as the pipeline says."""

    def __init__(self, model: Any, divided: tuple[str, ...] | None) -> None:
        super().__init__(model.module, 1, model.hf.sites)
        self.model = model
        self.pipeline = model.pipeline
        self.divided = divided
        self.words = Words(model.pipeline)
        self._one_by_one = runs_one_by_one(model.pipeline)
        self._parameters = inspect.signature(model.module.forward)
        self._keeping: Keeping | None = None
        self._guiding: Guiding | None = None
        self._schedule: object = None
        self._last: Now | None = None
        self._open = contextlib.ExitStack()

    @contextlib.contextmanager
    def keeping(self, keeping: Keeping) -> Iterator[None]:
        """Inside, steps are recorded."""
        if self._keeping is not None:
            raise RecordError("steps are recorded already; end the outer block first")
        self._keeping = keeping
        try:
            yield
        finally:
            self._keeping = None

    @contextlib.contextmanager
    def guided(self, guiding: Guiding) -> Iterator[None]:
        """Inside, the picture is moved before the steps that were chosen."""
        if self._guiding is not None:
            raise EditError("a run is guided already; end the outer block, or add the losses")
        self._guiding = guiding
        try:
            yield
        finally:
            self._guiding = None

    def begins(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Given | None:
        super().begins(args, kwargs)
        self.over()
        if self.module.training:
            raise ModelError(f"{type(self.module).__name__} is in training mode; call its eval()")
        bound = self._parameters.bind(*args, **kwargs)
        tensors = {name: each for name, each in leaves(bound.arguments) if each.numel()}
        self.batch = next((len(given) for given in tensors.values() if given.dim()), 1)
        now = self._next(bound.arguments)
        if self._guiding is None or not self._guiding.acts(now.step):
            self._stand(now, tensors, (args, kwargs))
            return None
        name = latents_in(bound.arguments)
        bound.arguments[name] = tensors[name] = self._moved(self._guiding, now, tensors, name)
        self._stand(now, tensors, (bound.args, bound.kwargs))
        return bound.args, bound.kwargs

    def _moved(self, guiding: Guiding, now: Now, tensors: dict[str, Tensor], name: str) -> Tensor:
        """The picture of all branches, moved by the slope at the conditional rows."""
        if CONDITIONAL in now.branches:
            rows = now.rows(CONDITIONAL, self.batch)
            part = slice(rows.start, rows.stop)
            one = {
                n: each[part] if each.dim() and len(each) == self.batch else each
                for n, each in tensors.items()
            }
            alone = replace(now, branches=(CONDITIONAL,))

            def record(picture: Tensor) -> Record:
                found = self.model.to_tokens({**one, name: picture})
                made = self.model.record(found, grad=True, statistics=())
                return self.words.on(made, self.model.hf.named, alone, found)

            with apart():
                denoising.stand(alone)
                guiding.find(now.step, one[name], record)
        shift = guiding.shift(now.step)
        if shift is None:
            return tensors[name]
        return tensors[name] + shift.repeat(len(now.branches), *[1] * (shift.dim() - 1))

    def _stand(self, now: Now, tensors: dict[str, Tensor], given: Given) -> None:
        """The call begins, with the edits and the recorders that are on."""
        edits = any(context.active(key) for key in self.model.part_keys.values())
        if not edits and self._keeping is None:
            denoising.stand(now)
            return
        found = self.model.hf.measured(tensors, next(iter(self.model.parts)), given)
        if edits:
            check_ready(self.model, found)
        if self._keeping is not None:
            self._record(self._keeping, now, found)
        denoising.stand(now)

    def ends(self) -> None:
        denoising.stand(None)
        with self._open:
            pass

    def over(self) -> None:
        """A call that ended in an error leaves nothing on."""
        denoising.stand(None)
        stack, self._open = self._open, contextlib.ExitStack()
        with contextlib.suppress(Exception):
            stack.__exit__(RecordError, RecordError("the call did not end"), None)

    def _record(self, keeping: Keeping, now: Now, found: Measured) -> None:
        """Record the call that begins now."""
        whole = isinstance(keeping.maps, str) or now.step in keeping.maps
        recorders = plan.recorders(
            keeping.model, found, keeping.statistics, keeping.layers, ("qk",) if whole else (), keeping.groups
        )

        def finish(kind: Any, error: Any, trace: Any) -> None:
            if error is None:
                record = plan.finish(keeping.model, found, recorders)
                record = self.words.on(record, self.model.hf.named, now, found)
                keeping.steps.add(now, record)

        self._open.enter_context(destination.keeping(recorders, "cpu", None, total(recorders.values())))
        self._open.push(finish)
        self._open.enter_context(destination.listening(recorders))

    def _next(self, bound: Mapping[str, Any]) -> Now:
        """Where the call that begins stands in its run. A pipeline that sets its timesteps anew begins a new run."""
        schedule = getattr(getattr(self.pipeline, "scheduler", None), "timesteps", None)
        if schedule is not self._schedule:
            self._schedule = schedule
            self.words.begin()
            if self._last is not None and self._keeping is not None and len(self._keeping.steps):
                raise RecordError("one block records one sampling run; begin another block for the next")
            self._last = None
        given = next((bound[name] for name in TIMES if bound.get(name) is not None), None)
        time = float(torch.as_tensor(given).reshape(-1)[0]) if given is not None else float("nan")
        last, step = self._last, 0 if self._last is None else self._last.step + 1
        known = branches = self._branches(bound)
        if self._one_by_one and self.divided is None:
            known = BRANCHES[:2]
            if (
                last is not None
                and last.timestep == time
                and getattr(self.pipeline.scheduler, "order", 1) == 1
            ):
                if last.branches == (UNCONDITIONAL,):
                    raise PromptError(
                        f"{type(self.pipeline).__name__} runs more branches than two one by one"
                    )
                step, branches = last.step, (UNCONDITIONAL,)
        self._last = Now(step, time, branches, known)
        return self._last

    def _branches(self, bound: Mapping[str, Any]) -> tuple[str, ...]:
        """The branches in this batch."""
        if self.divided is None:
            single = self.pipeline is None or self._one_by_one
            return (CONDITIONAL,) if single else branches_of(self.pipeline, self.module, bound)
        if self.batch % len(self.divided):
            raise PromptError(
                f"a batch of {self.batch} rows has no equal shares of {', '.join(self.divided)}; give "
                "branches= as they stand in the batch"
            )
        return self.divided
