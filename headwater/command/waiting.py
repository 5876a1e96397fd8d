"""What a terminal shows while a command works, and what is said where an optional library is missing."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from headwater.lens.errors import HeadwaterError


@contextmanager
def busy(work: str) -> Iterator[None]:
    """A moving sign on standard error, while it is a terminal, with the seconds gone by and the steps that are done."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    from headwater.lens.progress import telling

    columns = SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as signs:
        sign = signs.add_task(work, total=None)

        def tell(what: str, done: int, total: int | None, unit: str) -> None:
            signs.update(sign, description=f"{what}: {done}" + (f" of {total}" if total else ""))

        with telling(tell):
            yield


@contextmanager
def counted(work: str) -> Iterator[Any]:
    """A bar that fills as `tell(done, of)` says, on standard error, while it is a terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task(work, total=None)
        yield lambda done, of: progress.update(bar, completed=done, total=of)


@contextmanager
def extra(name: str) -> Iterator[None]:
    """Say which extra to install where an optional library is missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("headwater"):
            raise
        raise HeadwaterError(
            f"this needs {error.name}, which is missing; pip install 'headwater[{name}]'"
        ) from None
