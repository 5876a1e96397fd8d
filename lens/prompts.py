"""Prompt sets that ship with Headwater, for the analyses, the dashboard and the examples."""

from __future__ import annotations

from headwater.data.prompts import tasks
from headwater.lens.errors import PromptError, nearest


def prompt_sets() -> dict[str, str]:
    """Name → what the set is."""
    return {
        name: (generator.__doc__ or name).strip().splitlines()[0] for name, generator in tasks.TASKS.items()
    }


def prompt_set(name: str, n: int = 64, seed: int = 0) -> list[tasks.Example]:
    """`n` held-out examples of a task: each has `prompt`, `answer`, `wrong` answers and a `corrupted` twin."""
    if name not in tasks.TASKS:
        raise PromptError(f"unknown prompt set {name!r}: {nearest(name, tasks.TASKS)}")
    if n < 1:
        raise PromptError(f"a prompt set needs at least one example; got n={n}")
    return tasks.draw(name, n, seed)
