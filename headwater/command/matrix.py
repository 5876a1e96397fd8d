"""The matrix of `headwater doctor --matrix`: every analysis on every family of the zoo.

A cell is "right" (held to an independent way of having the numbers), "ran" (there is none), "refused" (one line),
"wrong" (differs from the independent way, or nothing but NaN), "error" (any other exception) or "not tried" (too slow).
"""

from __future__ import annotations

import functools
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import networkx as nx
import numpy as np
import xarray as xr

from headwater.analyses._catalogue.catalogue import Entry, catalogue
from headwater.command import matrix_calls
from headwater.command.matrix_oracles import difference
from headwater.command.matrix_plain import Plain
from headwater.lens.errors import HeadwaterError
from headwater.lens.journal import Journal
from headwater.lens.loading.coverage import quiet

LONGEST = 60.0  # seconds for one cell
# relative to the largest number; float32 against float64 stays below 1e-4, and 8 bits round what they multiply
TOLERANCE, ROUNDED = 1e-3, 5e-2
VERSIONS = ("headwater", "torch", "transformers")
State = Literal["right", "ran", "refused", "wrong", "error", "not tried"]
Tell = Callable[[int, int], None]


@dataclass(frozen=True)
class Cell:
    """What came of one analysis on one family; `difference` is the largest from the independent way, relative."""

    row: str
    analysis: str
    state: State
    line: str = ""
    difference: float | None = None
    seconds: float = 0.0


def measure(
    rows: Sequence[str] | None = None, analyses: Sequence[str] | None = None, path: str | Path | None = None,
    tell: Tell | None = None,
) -> list[Cell]:  # fmt: skip
    """Every cell of the rows and analyses (None: all). `path` is a journal: what it holds is not measured again."""
    rows = matrix_calls.names() if rows is None else rows
    asked = [each for name, each in catalogue().items() if analyses is None or name in analyses]
    run = {name: metadata.version(name) for name in VERSIONS}
    found: list[Cell] = []
    with quiet(), Journal.open(path, run, HeadwaterError) as journal:
        for place, row in enumerate(rows):
            if tell is not None:
                tell(place, len(rows))
            missing = [each for each in asked if journal.get(f"{row} {each.name}") is None]
            for cell in _row(row, missing) if missing else ():
                journal.put(f"{row} {cell.analysis}", asdict(cell))
            found += [Cell(**journal.get(f"{row} {each.name}")) for each in asked]
    return found


def _row(row: str, asked: list[Entry]) -> Iterator[Cell]:
    try:
        subject = matrix_calls.subject(row)
    except HeadwaterError as error:
        for each in asked:
            yield Cell(row, each.name, "refused", _line(error))
        return
    plain = functools.cache(lambda: Plain(subject))
    for each in asked:
        began = time.perf_counter()
        state, line, apart = _tried(each, subject, plain)
        yield Cell(row, each.name, state, line, apart, round(time.perf_counter() - began, 2))


def _tried(
    asked: Entry, subject: matrix_calls.Subject, plain: Callable[[], Plain]
) -> tuple[State, str, float | None]:
    try:
        with _limit(LONGEST):
            found = matrix_calls.call(asked, subject)
    except HeadwaterError as error:
        if "\n" in str(error):
            return "error", f"a refusal of several lines: {_line(error)}", None
        return "refused", _line(error), None
    except TimeoutError:
        return "not tried", f"takes more than {LONGEST:g} seconds", None
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{Path(last.filename).parent.name}/{Path(last.filename).name}:{last.lineno}"
        return "error", f"{type(error).__name__}: {_line(error)} ({place})", None
    if not _finite(found):
        return "wrong", "nothing but NaN, or an infinite number", None
    return _held(asked.name, plain, found)


def _held(name: str, plain: Callable[[], Plain], found: Any) -> tuple[State, str, float | None]:
    """A result beside the independent way of having it; where that way does not know the family, it only ran."""
    try:
        apart = difference(name, plain, found)
    except Exception as error:
        return "ran", f"the independent way fails: {type(error).__name__}: {_line(error)}", None
    if apart is None:
        return "ran", "", None
    state: State = "right" if apart < (ROUNDED if plain().rounds else TOLERANCE) else "wrong"
    return state, "" if state == "right" else f"differs by {apart:.0e} of the largest number", apart


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


def _finite(found: Any) -> bool:
    """Whether the numbers of a result are not all NaN, and none is infinite."""
    if isinstance(found, nx.DiGraph):
        values = [about.get("score", about.get("weight")) for _, _, about in found.edges(data=True)]
        numbers = [np.array([value for value in values if value is not None], dtype=float)]
    else:
        arrays = found.data_vars.values() if isinstance(found, xr.Dataset) else [found]
        numbers = [np.asarray(array.values) for array in arrays if array.dtype.kind in "fc"]
    known = [array for array in numbers if array.size]
    return not known or (
        any(np.isfinite(array).any() for array in known) and not any(np.isinf(array).any() for array in known)
    )


@contextmanager
def _limit(seconds: float) -> Iterator[None]:
    """TimeoutError inside the block after so many seconds, where the system has timers."""
    if not hasattr(signal, "setitimer"):
        yield
        return

    def stop(*_: Any) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
