"""`progress`: bars of long runs, in a terminal and in a notebook, and nowhere else."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from importlib.util import find_spec
from typing import Any, TypeVar

from tqdm import tqdm

Item = TypeVar("Item")
Bar = tqdm
NOTEBOOK = "ZMQInteractiveShell"  # the shell of Jupyter's kernels


def progress(
    steps: Iterable[Item] | None = None, *, desc: str, unit: str, total: int | None = None, delay: float = 0.0
) -> Bar[Item]:
    """A tqdm bar over `steps`, or over `total` calls of its `update`; it appears after `delay` seconds.

    A terminal and a notebook show it; a notebook without ipywidgets shows it as text. Pipes, files and batch jobs get
    nothing.
    """
    settings: dict[str, Any] = {"desc": desc, "unit": unit, "total": total, "delay": delay}
    kind: Any = tqdm
    if in_notebook() and find_spec("ipywidgets") is not None:
        from tqdm.notebook import tqdm as kind  # it needs ipywidgets
    # None: shown if stderr is a terminal
    return kind(steps, disable=False if in_notebook() else None, **settings)


def in_notebook() -> bool:
    """Whether this process is a Jupyter kernel."""
    interactive = sys.modules.get("IPython")
    shell = interactive.get_ipython() if interactive is not None else None
    return type(shell).__name__ == NOTEBOOK
