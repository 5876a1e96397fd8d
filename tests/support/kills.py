"""Processes that are killed (SIGKILL) at random moments of what they write, and what must be left after each.

`python tests/support/kills.py NAME|all COUNT [SEED]` prints how many processes were killed, and how many times the
work came to its end in between. AssertionError, exit code 1, where anything was lost or left half-written. One process
imports Headwater; its children are the ones that are killed.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import sweep_engines
import tiny_models
import torch
from small_experiments import asked

import headwater as hw
from headwater import analyses
from headwater.analyses._corpora import collect
from headwater.analyses._corpora.result import Corpus
from headwater.analyses._sweeps import run_sweep, worker
from headwater.lens.errors import HeadwaterError
from headwater.lens.experiments.run_file import run_file
from headwater.lens.files import write_text
from headwater.lens.journal import Journal

TEXT = "When Mary and John went to the store , John gave a drink to"
OTHER = TEXT.replace("John gave", "Mary gave")


JOURNALS = (".study", ".jsonl")  # whose pieces may stand in another order


@dataclass(frozen=True)
class Work:
    """What a process does in a folder; what must hold there after each kill.

    Work that `goes_on` keeps its finished pieces: begun again it does what is left, and ends with the same files, to
    the byte, as work that nobody disturbed. Other work writes its files over and over.
    """

    run: Callable[[Path], None]
    check: Callable[[Path], None]
    goes_on: bool = False
    begin: Callable[[Path], None] = lambda folder: None


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def saved() -> Work:
    """`record.save` over an older record."""
    model = hw.load(tiny_models.tiny("gpt2"))
    records = [model.record(tiny_models.batch(n, (40,) * 8)[0], keep="qkv") for n in (1, 2)]

    def run(folder: Path) -> None:
        for each in records:
            each.save(folder / "a.safetensors")

    def check(folder: Path) -> None:
        assert names_in(folder) == {"a.safetensors"}, names_in(folder)
        found = hw.Record.open(folder / "a.safetensors", verify=True)
        assert any(found.tokens.equal(each.tokens) for each in records)

    return Work(run, check, begin=lambda folder: records[0].save(folder / "a.safetensors") and None)


def streamed(generate: bool) -> Work:
    """Records that are written while the model runs, or writes."""
    model = hw.load(tiny_models.tiny("gpt2"))
    ids = tiny_models.batch(1, (40,) * 4)[0]

    def run(folder: Path) -> None:
        more: dict[str, Any] = {
            "keep_on": "disk",
            "path": folder / "a.safetensors",
            "keep": ("qkv", "residual"),
        }
        if generate:
            model.generate(ids, 6, record=True, **more)
        else:
            model.record(ids, **more)

    def check(folder: Path) -> None:
        assert names_in(folder) <= {"a.safetensors"}, names_in(folder)
        if (folder / "a.safetensors").exists():
            found = hw.Record.open(folder / "a.safetensors", verify=True)
            assert found.tokens[:, : ids.shape[1]].equal(ids)

    return Work(run, check)


def circuit() -> Work:
    """`write_circuit` over an older file, and a page beside it."""
    graph = analyses.read_circuit(Path(__file__).parents[1] / "saved" / "circuit.json")
    page = "<p>" + "x" * 10**6

    def run(folder: Path) -> None:
        for form in ("graphml", "json"):
            analyses.write_circuit(graph, folder / f"a.{form}")
        write_text(folder / "a.html", page, HeadwaterError)

    def check(folder: Path) -> None:
        assert names_in(folder) == {"a.graphml", "a.json", "a.html"}, names_in(folder)
        for form in ("graphml", "json"):
            assert len(analyses.read_circuit(folder / f"a.{form}")) == len(graph)
        assert (folder / "a.html").read_text() == page

    return Work(run, check, begin=run)


def experiment() -> Work:
    """An experiment of 16 prompts, with its file of finished ones."""
    model = hw.load("tasks-4l")
    words = TEXT.split()
    asks = asked(prompts=[" ".join(words[n % 9 :]) for n in range(16)], measures=["loss", "entropy"])

    def run(folder: Path) -> None:
        if not (folder / "run.results.json").exists():
            run_file(folder / "run.json", model)

    def check(folder: Path) -> None:
        assert names_in(folder) <= {"run.json", "run.results.json", "run.partial.jsonl"}, names_in(folder)

    return Work(run, check, goes_on=True, begin=lambda folder: asks.save(folder / "run.json") and None)


def study() -> Work:
    """A study of redistribution on several texts."""
    model = hw.load("sink-2l-softmax")
    texts = [
        "A dog ran to the house .",
        "The sun is",
        "The sun ran to the house .",
    ]

    def run(folder: Path) -> None:
        found = analyses.redistribution_study(
            model, texts, keep="0 0.25 0.5 0.75", rule=None, keys=[0], controls=2, draws=9, batch_size=1,
            resume=folder / "a.study",
        )  # fmt: skip
        write_text(folder / "a.json", json.dumps(found.to_dict(), default=str), HeadwaterError)

    def check(folder: Path) -> None:
        assert names_in(folder) <= {"a.study", "a.json"}, names_in(folder)

    return Work(run, check, goes_on=True)


def corpora() -> Work:
    """Statistics of heads over texts, saved after each text."""
    model = hw.load("tasks-4l")
    words = TEXT.split()
    texts = "".join(json.dumps({"text": " ".join(words[n % 9 :])}) + "\n" for n in range(12))

    def run(folder: Path) -> None:
        with mock.patch.object(collect, "SAVED_EVERY", 0.0):
            collect.corpus(model, folder / "texts.jsonl", out=folder / "a.safetensors", keep=2)

    def check(folder: Path) -> None:
        assert names_in(folder) <= {"texts.jsonl", "a.safetensors", ".a.safetensors.lock"}, names_in(folder)
        if (folder / "a.safetensors").exists():
            Corpus.open(folder / "a.safetensors", verify=True)

    def begin(folder: Path) -> None:
        (folder / "texts.jsonl").write_text(texts)

    return Work(run, check, goes_on=True, begin=begin)


def sweeps() -> Work:
    """A sweep whose worker is in the same process: its ledger and the files of its units."""
    model = hw.load("tasks-4l")
    asks = sweep_engines.asked(seeds=[0, 1], analyses=[{"analysis": "agreement", "settings": {"draws": 20}}])

    def run(folder: Path) -> None:
        with (
            mock.patch.object(run_sweep, "open_model", return_value=model),
            mock.patch.object(worker, "open_model", return_value=model),
            mock.patch.object(run_sweep, "_engine", lambda kind, setup, *_: sweep_engines.Here(setup, {})),
        ):
            found = run_sweep.run_sweep(asks, folder / "a.run", base=folder, workers=1)
        assert found.counts()["failed"] == 0, found.table()["error"].tolist()
        write_text(folder / "digest", found.digest(), HeadwaterError)

    def check(folder: Path) -> None:
        assert names_in(folder) <= {"a.run", "digest"}, names_in(folder)
        if (folder / "a.run" / "ledger.sqlite").exists():
            assert not list(hw.SweepRun(folder / "a.run").damaged())

    return Work(run, check, goes_on=True)


def pieces() -> Work:
    """The file of finished pieces by itself: what was told to be kept is there."""
    told = "told"

    def run(folder: Path) -> None:
        with Journal.open(folder / "a.jsonl", {"of": "kills"}, HeadwaterError) as kept:
            for number in range(100):
                if kept.get(str(number)) is None:
                    kept.put(str(number), [number / 3] * 50)
                    (folder / told).write_text(str(number + 1))

    def check(folder: Path) -> None:
        if (folder / told).exists():
            with Journal.open(folder / "a.jsonl", {"of": "kills"}, HeadwaterError) as kept:
                for number in range(int((folder / told).read_text() or 0)):
                    assert kept.get(str(number)) == [number / 3] * 50, number

    return Work(run, check, goes_on=True)


WORKS: dict[str, Callable[[], Work]] = {
    "records": saved,
    "streamed records": lambda: streamed(False),
    "generations": lambda: streamed(True),
    "circuits": circuit,
    "experiments": experiment,
    "studies": study,
    "corpora": corpora,
    "sweeps": sweeps,
    "pieces": pieces,
}


def killed(work: Work, count: int, seed: int = 0) -> dict[str, int]:
    """Kill a process at that work `count` times, and look after each; work that goes on is brought to its end."""
    chance, kills, ends = random.Random(seed), 0, 0
    with tempfile.TemporaryDirectory() as made:
        whole = Path(made) / "whole"
        taken = timed(work, whole)
        folder = fresh(work, Path(made) / "0")
        # of work that goes on a run does a part, so that it is killed several times before it ends
        longest = taken * (0.3 if work.goes_on else 1.1)
        while kills < count:
            child = begun(work, folder)
            time.sleep(chance.uniform(0, longest))
            os.kill(child, signal.SIGKILL)
            status = os.waitpid(child, 0)[1]
            assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, f"it ended with {status}"
            work.check(folder)
            if os.WIFSIGNALED(status):
                kills += 1
            else:
                ends += 1
                same(work, folder, whole)
                folder = fresh(work, Path(made) / str(ends))
        if work.goes_on:
            timed(work, folder, new=False)
            ends += 1
            same(work, folder, whole)
    return {"kills": kills, "ends": ends}


def fresh(work: Work, folder: Path) -> Path:
    folder.mkdir()
    work.begin(folder)
    return folder


def begun(work: Work, folder: Path) -> int:
    """A child at the work."""
    child = os.fork()
    if child == 0:
        try:
            work.run(folder)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return child


def timed(work: Work, folder: Path, new: bool = True) -> float:
    """The seconds that the work takes when nobody disturbs it."""
    if new:
        fresh(work, folder)
    start = time.monotonic()
    status = os.waitpid(begun(work, folder), 0)[1]
    assert status == 0, f"undisturbed it ends with {status}"
    work.check(folder)
    return time.monotonic() - start


def same(work: Work, folder: Path, whole: Path) -> None:
    """Work that goes on ends with the files of undisturbed work; in a journal pieces may stand in another order."""
    if not work.goes_on:
        return
    assert names_in(folder) == names_in(whole)
    for path in filter(Path.is_file, whole.iterdir()):  # of a run's folder the file of its digest speaks
        here, there = (folder / path.name).read_bytes(), path.read_bytes()
        if path.suffix in JOURNALS:
            here, there = sorted(here.split(b"\n")), sorted(there.split(b"\n"))
        assert here == there, path.name


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in WORKS if sys.argv[1] == "all" else [sys.argv[1]]:
        print(json.dumps({"name": name, **killed(WORKS[name](), *map(int, sys.argv[2:]))}), flush=True)
