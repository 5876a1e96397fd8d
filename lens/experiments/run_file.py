"""Running an experiment file: results go beside it, or are verified against those that are there.

Each prompt's result goes to a journal as soon as it is there, so that an interrupted run is taken up again.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headwater.lens.errors import ExperimentError
from headwater.lens.experiments.experiment import Experiment
from headwater.lens.experiments.results import Results, is_result, numbers_of
from headwater.lens.journal import Journal

if TYPE_CHECKING:
    from headwater.lens.model import HookedModel

RESULTS, JOURNAL = ".results.json", ".partial.jsonl"


@dataclass(frozen=True)
class Outcome:
    """Results of one run of a file. `verified`: None for a first run, else whether earlier results agree.

    `largest` is the largest difference of two numbers, `differing` says where they differ by more than allowed.
    """

    results: Results
    path: Path
    verified: bool | None
    largest: float
    differing: list[str]
    numbers: int


def run_file(
    path: Path, model: HookedModel | None = None, tell: Callable[[int, int], object] | None = None
) -> Outcome:
    """Run an experiment file, write results beside it, or verify those that are there.

    `tell(done, of)` hears of progress. An interrupted run leaves what is done, and is taken up again.
    """
    experiment = Experiment.open(path)
    folder = path.resolve().parent
    target, partial = _beside(path, RESULTS), _beside(path, JOURNAL)
    _earlier(target, experiment)
    opened = experiment.load(folder) if model is None else model
    run = {"inputs": experiment.inputs_digest(), "revision": opened.revision}
    run |= {"tokenizer": told} if (told := opened.tokenizer_revision) else {}
    run |= {"processor": told} if (told := opened.processor_revision) else {}
    count = len(experiment.prompts)
    with Journal.open(partial, run, ExperimentError, anew=True) as kept:
        earlier = _earlier(target, experiment)  # once more: another run may have come to its end meanwhile
        done = {n: found for n in range(count) if is_result(found := kept.get(str(n)))}

        def keep(number: int, result: dict[str, Any]) -> None:
            kept.put(str(number), result)
            done[number] = result
            if tell is not None:
                tell(len(done), count)

        results = experiment.run(opened, folder=folder, done=dict(done), tell=keep)
        if earlier is None:
            results.save(target)
        partial.unlink()
    if earlier is None:
        return Outcome(results, target, None, 0.0, [], sum(1 for _ in numbers_of(results.results)))
    return _compared(experiment, opened, earlier, results, target)


def _earlier(target: Path, experiment: Experiment) -> Results | None:
    """The results that are there; those of another version of the experiment are refused."""
    if not target.exists():
        return None
    found = Results.open(target)
    if found.inputs != experiment.inputs_digest():
        raise ExperimentError(
            f"{target} holds the results of another version of this experiment; move or delete it"
        )
    return found


def _compared(
    experiment: Experiment, opened: HookedModel, earlier: Results, results: Results, target: Path
) -> Outcome:
    before, after = dict(numbers_of(earlier.results)), dict(numbers_of(results.results))
    differing = sorted(before.keys() ^ after.keys())
    largest = 0.0
    for name in before.keys() & after.keys():
        a, b = before[name], after[name]
        if not (isinstance(a, int | float) and isinstance(b, int | float)):
            if a != b:
                differing.append(name)
            continue
        largest = max(largest, abs(a - b))
        if not math.isclose(a, b, rel_tol=experiment.tolerance, abs_tol=experiment.tolerance):
            differing.append(name)
    if not opened.weights_digest.matches(earlier.revision):
        differing.append("revision of the model")
    return Outcome(results, target, not differing, largest, differing, len(after))


def _beside(path: Path, ending: str) -> Path:
    """`run.json` → `run.results.json` in the same folder; a link that leads out of it is refused."""
    found = path.with_name(path.stem + ending)
    if found.is_symlink() or (found.exists() and not found.is_file()):
        raise ExperimentError(f"{found} is a link or no plain file; delete it")
    return found
