"""The results that are pinned on the page Catalogue, as the run that is shown gives them."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

from headwater.analyses._catalogue.catalogue import Entry, entry
from headwater.dashboard.running import catalogue, jobs, pairs
from headwater.dashboard.running.measure import Measure
from headwater.dashboard.running.runs import Run
from headwater.dashboard.state.state import State
from headwater.lens.errors import HeadwaterError

PINS = "catalogue.pins"


@dataclass(frozen=True)
class Pinned:
    """`told` is the analysis and its settings in words; `why` says why it has no result on this input."""

    asked: Entry
    told: str
    key: Hashable = None
    work: Callable[[], Any] = lambda: None
    why: str = ""

    @property
    def result(self) -> Any:
        """The result, where it has been computed."""
        return None if self.why else jobs.results.get(self.key)


def pinned(state: State, run: Run, chosen: Measure) -> list[Pinned]:
    """All that are pinned; each can be computed, and the result is that of the page Catalogue."""
    return [
        _one(state, run, chosen, entry(name), given) for name, given in catalogue.pins_of(state.listed(PINS))
    ]


def in_words(name: str, settings: dict[str, Any]) -> str:
    told = ", ".join(f"{key} {catalogue.as_text(value)}" for key, value in settings.items())
    return f"{name}: {told}" if told else name


def _one(state: State, run: Run, chosen: Measure, asked: Entry, given: dict[str, Any]) -> Pinned:
    told = in_words(asked.name, given)
    try:
        settings = catalogue.read(asked, catalogue.typed(asked, given), given)
        corrupt = pairs.corrupt(state, chosen) if asked.inputs == "model+pairs" else None
    except HeadwaterError as error:
        return Pinned(asked, told, why=str(error))
    other = corrupt.example if corrupt else None
    return Pinned(
        asked,
        told,
        catalogue.key_of(asked, settings, run, chosen, corrupt),
        lambda: catalogue.ask(state, run, chosen, asked, settings, other),
    )
