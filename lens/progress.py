"""`progress`: bars of long runs, in a terminal and in a notebook, and nowhere else."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from importlib.util import find_spec
from typing import Any, Generic, TypeVar

from tqdm import tqdm

Item = TypeVar("Item")
Tell = Callable[[str, int, int | None, str], object]
Check = Callable[[], object]
DELAY = 1.0  # seconds after which a run shows its bar
# each thread and each task counts its own
_open: ContextVar[tuple[Bar, ...]] = ContextVar("headwater_bars", default=())
_telling: ContextVar[Tell | None] = ContextVar("headwater_telling", default=None)
_check: ContextVar[Check | None] = ContextVar("headwater_check", default=None)


class Bar(Generic[Item]):
    """Steps that are counted; a tqdm bar shows them once `DELAY` seconds have passed.

    Iterate over it, or enter it with `with` and call `update`. A bar inside of another one goes when it is done, and
    the outermost stays.
    """

    def __init__(
        self, steps: Iterable[Item] | None, desc: str, unit: str, total: int | None, done: int
    ) -> None:
        self.steps = steps
        self.told: dict[str, Any] = {"desc": desc, "unit": unit, "total": total}
        self.done = self.first = done
        self.begun = time.time()
        self.tell = _telling.get()
        self.kind = None if self.tell else _kind()
        self.drawn: Any = None
        self.outermost = self.heard = True
        self.ended = False

    def __enter__(self) -> Bar[Item]:
        around = [bar for bar in _open.get() if not bar.ended]
        self.outermost = not around
        # the one step of a run over one text says nothing: whoever listens hears the steps inside of it
        self.heard = self.told["total"] != 1 and all(bar.told["total"] == 1 for bar in around)
        self.update(0)
        _open.set((*around, self))
        return self

    def __exit__(self, *error: object) -> None:
        self.ended = True  # a generator may end in another context than it began in
        _open.set(tuple(bar for bar in _open.get() if bar is not self))
        if self.drawn is not None:
            self.drawn.close()

    def __iter__(self) -> Iterator[Item]:
        assert self.steps is not None
        with self:
            for step in self.steps:
                yield step
                self.update()

    def update(self, steps: int = 1) -> None:
        """Count `steps` more as done."""
        self.done += steps
        heed()
        if self.tell is not None and self.heard:
            self.tell(self.told["desc"], self.done, self.told["total"], self.told["unit"])
        if self.drawn is not None:
            self.drawn.update(steps)
        elif self.kind is not None and self.done != self.told["total"] and time.time() - self.begun >= DELAY:
            self.drawn = self.kind(**self.told, initial=self.done)
            self.drawn.initial, self.drawn.start_t = self.first, self.begun  # from there the speed is told
            self.drawn.leave = self.drawn.pos == 0 and self.outermost


def progress(
    steps: Iterable[Item] | None = None, *, desc: str, unit: str, total: int | None = None, done: int = 0
) -> Bar[Item]:
    """A bar over `steps`, or over `total` calls of its `update`, for runs that take longer than a second.

    `done` of them an earlier run has done; they say nothing about the speed of this one.

    A terminal and a notebook show it; a notebook without ipywidgets shows it as text. Pipes, files and batch jobs get
    nothing.
    """
    if total is None and hasattr(steps, "__len__"):
        total = len(steps)  # type: ignore[arg-type]
    return Bar(steps, desc, unit, total, done)


@contextmanager
def telling(tell: Tell, check: Check | None = None) -> Iterator[None]:
    """Within it no bar is drawn: `tell(what, done, total, unit)` hears what the outermost of more than one step counts.

    `check` is called at every step of every bar and in every attention layer; what it raises ends the run.
    """
    tokens = [(_telling, _telling.set(tell)), (_check, _check.set(check)), (_open, _open.set(()))]
    try:
        yield
    finally:
        for variable, token in tokens:
            variable.reset(token)


def heed() -> None:
    """Call the `check` of `telling`, which may end the run."""
    check = _check.get()
    if check is not None:
        check()


def in_notebook() -> bool:
    """Whether this process is the kernel of a notebook: Jupyter, Colab, VS Code."""
    interactive = sys.modules.get("IPython")
    shell = interactive.get_ipython() if interactive is not None else None
    return getattr(shell, "kernel", None) is not None  # the shell of a terminal has none


def _kind() -> Callable[..., tqdm] | None:
    """What draws a bar here; None where nobody watches."""
    if in_notebook():
        if find_spec("ipywidgets") is None:
            return lambda **told: tqdm(**told, file=sys.stdout)  # notebooks show stderr as an error
        from tqdm.notebook import tqdm as drawn  # it needs ipywidgets

        return drawn
    return tqdm if sys.stderr is not None and sys.stderr.isatty() else None
