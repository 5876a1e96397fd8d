"""`Worker`: one process that holds the model, runs units one after another, and writes the file of each.

It reads lines of JSON from standard input and answers in lines of JSON. It ends when its driver does: nothing is left
behind by a driver that was killed. What goes wrong with a unit is an answer; the driver sees what ends the process.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import itertools
import json
import os
import platform
import queue
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO, Any

import torch

from headwater.analyses._catalogue.calling import ask
from headwater.analyses._catalogue.catalogue import entry
from headwater.analyses._sweeps.kept import pack
from headwater.analyses._sweeps.reading import Read, Reading
from headwater.analyses._sweeps.sweep import Sweep
from headwater.analyses._sweeps.sweep_run import MOST_UNIT, UNITS, SweepRun, no_links, of_bytes
from headwater.analyses._sweeps.unit import Unit
from headwater.kernels.compiled.walks import computed_by
from headwater.lens.edits.patterns import named_files
from headwater.lens.errors import HeadwaterError, SweepError, named_line
from headwater.lens.experiments import edits_on_parts
from headwater.lens.experiments.named_model import load_named
from headwater.lens.experiments.results import versions_now
from headwater.lens.files import read_bytes, write_bytes
from headwater.lens.model import HookedModel

CODE = ("kernels", "lens", "analyses")  # the folders whose code decides numbers


@dataclass(frozen=True)
class Setup:
    """What a worker needs before its first unit: the sweep's folder, the run folder, a model of the user's own.

    The sweep itself, which may be large, is read from the run folder.
    """

    base: str
    run: str
    model: str | None = None


class _DiskError(Exception):
    """A file that could not be written: the unit is sound, and its worker is not."""


class _ChangedError(Exception):
    """What a unit reads is not what was there when the run began."""


class Worker:
    """The model of a sweep, opened once."""

    def __init__(self, setup: Setup) -> None:
        self.base, self.run = Path(setup.base), Path(setup.run)
        run = SweepRun(self.run)
        self.sweep, self.units = run.sweep, run.units
        torch.set_num_threads(self.sweep.threads)
        self.model = open_model(self.sweep, self.base, setup.model)
        # a corpus is not read whole by every worker: each text is held to the key of its unit
        corpus = {name: run.manifest.facts.get(name) for name in ("corpus", "texts")}
        self.facts = facts_of(self.sweep, self.model, self.base) | (corpus if self.sweep.corpus else {})
        self.reading = Reading(self.sweep, self.model, self.facts, self.base)

    def answer(self, number: int, key: str) -> dict[str, Any]:
        """What came of a unit, as plain data: `digest`, `bytes` and `seconds`, or a `reason` of a kind."""
        started = time.perf_counter()
        told: dict[str, Any] = {"number": number}
        try:
            content = pack(*self._computed(self.units[number], key))
            try:
                self._write(key, content)
            except (OSError, SweepError) as error:
                raise _DiskError(str(error)) from None
        except _DiskError as error:
            return {**told, "kind": "disk", "reason": str(error)}
        except _ChangedError as error:
            return {**told, "kind": "changed", "reason": str(error)}
        except HeadwaterError as error:  # it would be said again
            return {**told, "kind": "refused", "reason": " ".join(str(error).split())}
        except Exception as error:
            gc.collect()  # of what an allocation that failed has left
            return {**told, "kind": "error", "reason": named_line(error)}
        seconds = time.perf_counter() - started
        return {
            **told,
            "kind": "done",
            "digest": of_bytes(content),
            "bytes": len(content),
            "seconds": seconds,
        }

    def _computed(self, unit: Unit, key: str) -> tuple[Any, dict[str, Any]]:
        read = self._read(unit, key)
        asked = entry(unit.analysis)
        known = {setting.name for setting in asked.settings}
        settings = {name: value for name, value in read.own.items() if name in known} | unit.settings
        settings |= {"seed": unit.seed} if "seed" in known and "seed" not in settings else {}
        by_record = asked.inputs == "record"
        if unit.layers is not None and not by_record:
            settings["layers"] = unit.layers
        with torch.random.fork_rng(), edits_on_parts.editing(self.model, self._edits(unit.edits)):
            torch.manual_seed(unit.seed)
            layers = unit.layers if by_record else None
            result = ask(asked, self.model, read.given, settings, layers=layers)
        return result, unit.to_dict() | {"given": read.told}

    def _read(self, unit: Unit, key: str) -> Read:
        """What the unit reads; a text of a corpus only where the unit's key is of that text."""
        if unit.kind != "text":
            return self.reading.read(unit)
        try:
            found = self.reading.read(unit)
            there = self.reading.key(unit, self.reading.digest(found))
        except HeadwaterError as error:
            raise _ChangedError(f"the corpus changed while the run went on: {error}") from None
        if there != key:
            raise _ChangedError(
                f"the corpus changed while the run went on: {found.name} is another text; put it back, then "
                "`headwater sweep resume`"
            )
        return found

    @cache  # noqa: B019, a worker lives as long as its process
    def _edits(self, name: str) -> list[edits_on_parts.PartEdit]:
        return [edits_on_parts.read(in_folder(edit, self.base)) for edit in self.sweep.edits[name]]

    def _write(self, key: str, content: bytes) -> None:
        file = self.run / UNITS / key[:2] / f"{key}.safetensors"
        no_links(file.parent, file)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(file, content, SweepError)


def open_model(sweep: Sweep, base: Path, own: str | None) -> HookedModel:
    """The sweep's model, or the user's `own` in its place, and the part that is asked."""
    if own is None:
        model = load_named(sweep.model, base, sweep.dtype, "sweep", sweep.prepend_bos)
    else:
        from headwater.lens.loading.load import load

        model = load(own, dtype=getattr(torch, sweep.dtype), prepend_bos=sweep.prepend_bos)
    if sweep.device != "cpu":
        if not torch.cuda.is_available():
            raise SweepError(f"device {sweep.device!r}: torch sees none here; give device 'cpu'")
        model.hf.to(sweep.device)
    if sweep.revision is not None and not model.weights_digest.matches(sweep.revision):
        raise SweepError(
            f"the sweep is of weights {sweep.revision}, {model.name} has {model.revision}; leave out the revision to "
            "take them all the same"
        )
    return model if sweep.part is None else model.part(sweep.part)


def facts_of(sweep: Sweep, model: HookedModel, base: Path) -> dict[str, Any]:
    """Everything beside the sweep that decides its numbers."""
    device = (
        torch.cuda.get_device_name() if sweep.device == "cuda" else torch.backends.cpu.get_cpu_capability()
    )
    found = {
        "revision": model.revision, "tokenizer": model.tokenizer_revision, "processor": model.processor_revision,
        "code": code_digest(), "machine": platform.machine(), "capability": device,
    }  # fmt: skip
    for edit in itertools.chain(*sweep.edits.values()):
        for name, file in named_files(in_folder(edit, base)).items():
            found[f"record {edit[name]}"] = of_bytes(read_bytes(Path(file), MOST_UNIT, SweepError))
    return {**found, **versions_now(), "torch": torch.__version__, "statistics": computed_by()}


@cache
def code_digest() -> str:
    """sha256 over the source files that compute."""
    root = Path(__file__).resolve().parents[2]
    found = hashlib.sha256()
    for folder in CODE:
        for file in sorted((root / folder).rglob("*.py")):
            content = file.read_bytes()
            found.update(f"{file.relative_to(root).as_posix()} {len(content)}\n".encode() + content)
    return "sha256:" + found.hexdigest()


def in_folder(edit: Mapping[str, Any], base: Path) -> dict[str, Any]:
    """An edit whose record files lie in the sweep's folder."""
    return edits_on_parts.contained(edit, base, SweepError, "sweep")


def main() -> None:
    """Answer the driver's lines until they end."""
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(sys.stdin, lines), daemon=True).start()
    with _private_output() as answers:

        def say(told: Mapping[str, Any]) -> None:
            answers.write(json.dumps(told) + "\n")
            answers.flush()

        try:
            worker = Worker(Setup(**json.loads(lines.get())))
        except HeadwaterError as error:
            say({"kind": "unopened", "reason": " ".join(str(error).split())})
            return
        say({"kind": "opened", "facts": worker.facts})
        while True:
            task = json.loads(lines.get())
            say(worker.answer(task["number"], task["key"]))


def _listen(source: IO[str], lines: queue.SimpleQueue[str]) -> None:
    for line in source:
        lines.put(line)
    os._exit(0)  # the driver is gone, and what is being computed is nobody's


@contextlib.contextmanager
def _private_output() -> Iterator[IO[str]]:
    """Standard output for the answers alone: what a library prints goes to standard error."""
    kept = os.dup(1)
    os.dup2(2, 1)
    with os.fdopen(kept, "w", encoding="utf-8") as answers:
        yield answers


if __name__ == "__main__":
    main()
