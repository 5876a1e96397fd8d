"""Results of an experiment beside its file: run, resumed, verified against those that are there.

Each prompt's result goes to a journal as soon as it is there, so that an interrupted run is taken up again; the results
themselves are written beside and renamed, with a digest over what was asked and what came.
"""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headwater.lens.errors import ExperimentError
from headwater.lens.experiments.experiment import VERSIONS, Experiment, digest_of, read_text

if TYPE_CHECKING:
    from headwater.lens.model import HookedModel

RESULTS, JOURNAL = ".results.json", ".partial.jsonl"


@dataclass(frozen=True)
class Results:
    """What came: `results` holds {"before": …, "after": …} of each prompt, by measure; plain data."""

    inputs: str
    model: str
    revision: str
    results: list[dict[str, Any]]
    versions: dict[str, str]
    machine: str

    @classmethod
    def of(cls, experiment: Experiment, model: HookedModel, results: list[dict[str, Any]]) -> Results:
        versions = {name: version(name) for name in VERSIONS}
        # what JSON makes of the numbers is what is compared later
        plain = json.loads(json.dumps(results, allow_nan=False))
        return cls(
            experiment.inputs_digest(), model.name, model.revision, plain, versions, platform.machine()
        )

    @property
    def digest(self) -> str:
        """sha256 over what was asked, of which weights, and what came."""
        return digest_of({"inputs": self.inputs, "revision": self.revision, "results": self.results})

    def to_json(self) -> str:
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return json.dumps({**fields, "digest": self.digest}, indent=1, allow_nan=False) + "\n"

    @classmethod
    def open(cls, path: Path) -> Results:
        """Read what was written; ExperimentError where it was changed since, or is none."""
        try:
            data = json.loads(read_text(path))
            found = cls(**{name: data[name] for name in cls.__dataclass_fields__})
            same = data["digest"] == found.digest
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise ExperimentError(
                f"{path} holds no results of an experiment ({type(error).__name__})"
            ) from None
        if not same:
            raise ExperimentError(
                f"{path} was changed after it was written: its digest is another; delete it"
            )
        return found


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
    target, journal = _beside(path, RESULTS), _beside(path, JOURNAL)
    earlier = Results.open(target) if target.exists() else None
    if earlier is not None and earlier.inputs != experiment.inputs_digest():
        raise ExperimentError(
            f"{target} holds the results of another version of this experiment; move or delete it"
        )
    opened = experiment.load(folder) if model is None else model
    head = {"inputs": experiment.inputs_digest(), "revision": opened.revision}
    done = _journalled(journal, head, len(experiment.prompts))
    try:
        with journal.open("w", encoding="utf-8") as lines:
            for line in (head, *({"prompt": n, "result": r} for n, r in done.items())):
                lines.write(json.dumps(line) + "\n")
            lines.flush()

            def keep(number: int, result: dict[str, Any]) -> None:
                lines.write(json.dumps({"prompt": number, "result": result}, allow_nan=False) + "\n")
                lines.flush()
                os.fsync(lines.fileno())
                done[number] = result
                if tell is not None:
                    tell(len(done), len(experiment.prompts))

            results = experiment.run(opened, folder=folder, done=dict(done), tell=keep)
        if earlier is None:
            write_text(target, results.to_json())
    except OSError as error:
        raise ExperimentError(f"can not write beside {path}: {error.strerror or error}") from None
    journal.unlink()
    if earlier is None:
        return Outcome(results, target, None, 0.0, [], sum(1 for _ in numbers_of(results.results)))
    return _compared(experiment, earlier, results, target)


def _compared(experiment: Experiment, earlier: Results, results: Results, target: Path) -> Outcome:
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
    if earlier.revision != results.revision:
        differing.append("revision of the model")
    return Outcome(results, target, not differing, largest, differing, len(after))


def numbers_of(content: Any, name: str = "results") -> Iterator[tuple[str, Any]]:
    """Every single value with where it stands, such as `results.0.after.loss`."""
    if isinstance(content, dict):
        for key, value in content.items():
            yield from numbers_of(value, f"{name}.{key}")
    elif isinstance(content, list):
        for i, value in enumerate(content):
            yield from numbers_of(value, f"{name}.{i}")
    else:
        yield name, content


def write_text(path: Path, text: str) -> Path:
    """Write beside and rename."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with beside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        raise ExperimentError(f"can not write {path}: {error.strerror or error}") from None
    finally:
        beside.unlink(missing_ok=True)
    return path


def _beside(path: Path, ending: str) -> Path:
    """`run.json` → `run.results.json` in the same folder; a link that leads out of it is refused."""
    found = path.with_name(path.stem + ending)
    if found.is_symlink() or (found.exists() and not found.is_file()):
        raise ExperimentError(f"{found} is a link or no plain file; delete it")
    return found


def _journalled(journal: Path, head: dict[str, Any], prompts: int) -> dict[int, Any]:
    """What an interrupted run of the same experiment had done; a line that was cut short does not count."""
    if not journal.exists():
        return {}
    done: dict[int, Any] = {}
    for i, line in enumerate(read_text(journal).splitlines()):
        try:
            found = json.loads(line)
            if i == 0 and found != head:
                return {}
            if i and isinstance(found["prompt"], int) and 0 <= found["prompt"] < prompts:
                done[found["prompt"]] = found["result"]
        except (KeyError, TypeError, ValueError, RecursionError):
            break
    return done
