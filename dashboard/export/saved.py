"""Saved runs: a view with its experiment and results, kept in the workspace, and whether it still holds."""

from __future__ import annotations

import json
import tempfile
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import headwater as hw
from headwater.dashboard.export import experiment as form
from headwater.dashboard.running import runs
from headwater.dashboard.running.measure import Measure
from headwater.dashboard.running.models import resident
from headwater.dashboard.state import workspace
from headwater.dashboard.state.state import State
from headwater.lens.errors import HeadwaterError
from headwater.lens.experiments.run_file import run_file

TOLERANCE = 1e-4  # between the numbers of a page and those of the experiment, run anew
LAST = 2**32  # seconds of a time that can be told


@dataclass(frozen=True)
class Saved:
    """`address` opens the view; `values` are the measure in A and B; `gap` is between the page and the experiment."""

    words: str
    address: dict[str, str]
    measure: str
    values: list[float | None]
    experiment: str
    results: str
    gap: float | None
    saved: float

    @property
    def when(self) -> str:
        return time.strftime("%Y-%m-%d %H:%M", time.localtime(self.saved))

    @property
    def state(self) -> str:
        if self.gap is None:
            return "not compared: the experiment states another quantity"
        return "agrees with the page" if self.gap <= TOLERANCE else f"differs from the page by {self.gap:.2g}"


def save(state: State, address: dict[str, str], words: str, chosen: Measure) -> str:
    """Run a view as an experiment, and keep it with what came; gives its name."""
    asked = form.as_experiment(state, chosen)
    with tempfile.TemporaryDirectory() as folder:
        if any(prompt.image is not None for prompt in asked.prompts):
            (Path(folder) / form.PICTURE).write_bytes(form.picture_bytes(state))
        results = form.run(asked, state, Path(folder))
    other = runs.b(state)
    values = [chosen.value(chosen.plain), None if other is None else chosen.value(other)]
    gap = form.gap(results, state, chosen)
    found = Saved(words, address, chosen.label, values, asked.to_json(), results.to_json(), gap, time.time())
    return workspace.keep("runs", json.dumps(asdict(found)).encode())


def opened(name: str) -> Saved | None:
    """A saved run; None where there is none of that name, or it is not one."""
    data = workspace.kept_json("runs", name)
    return Saved(**data) if isinstance(data, dict) and _whole(data) else None


def _whole(data: dict[str, Any]) -> bool:
    """Whether every field is there and of its kind: the folder may hold what another program wrote."""
    if set(data) != {each.name for each in fields(Saved)}:
        return False
    texts = [data[name] for name in ("words", "measure", "experiment", "results")]
    address, values = data["address"], data["values"]
    if not isinstance(address, dict) or not isinstance(values, list) or len(values) != 2:
        return False
    numbers = [data["saved"], *(value for value in (data["gap"], *values) if value is not None)]
    return (
        all(isinstance(text, str) for text in [*texts, *address.values()])
        and all(isinstance(number, int | float) and not isinstance(number, bool) for number in numbers)
        and 0 <= data["saved"] <= LAST
        and _of(data["experiment"]) is not None
    )


def _of(text: str) -> hw.Experiment | None:
    try:
        return hw.Experiment.from_json(text)
    except HeadwaterError:
        return None


def everything() -> dict[str, Saved]:
    """All saved runs by name, the newest first."""
    found = {name: opened(name) for name in workspace.names("runs")}
    return {name: each for name, each in found.items() if each is not None}


def verify(saved: Saved, state: State) -> str:
    """Run it again on the model of a state, and say in a line whether it still gives what was saved."""
    revision, model = hw.Experiment.from_json(saved.experiment).revision, resident(state.model)
    if revision is not None and not model.weights_digest.matches(revision):
        return f"the weights of {model.name} are others than those that it was saved with, so it is not run again"
    with tempfile.TemporaryDirectory() as folder:
        for name, content in files(saved, state).items():
            (Path(folder) / name).write_bytes(content)
        found = run_file(Path(folder) / form.FILE, model)
    if found.verified:
        return f"agrees: {found.numbers} numbers, largest difference {found.largest:.2g}"
    return f"differs in {', '.join(found.differing[:3])}; largest difference {found.largest:.2g}"


def words_of(state: State, changes: list[str]) -> str:
    """A line that tells saved runs apart."""
    text = state.text or state.picture.removeprefix("sample:")
    return f"{state.model}: {text[:60]}" + (f" | {'; '.join(changes)}" if changes else "")


def files(saved: Saved, state: State) -> dict[str, bytes]:
    """Experiment, results and picture by the names that they have side by side."""
    found = {form.FILE: saved.experiment.encode(), form.RESULTS: saved.results.encode()}
    if hw.Experiment.from_json(saved.experiment).prompts[0].image is not None:
        found[form.PICTURE] = form.picture_bytes(state)
    return found
