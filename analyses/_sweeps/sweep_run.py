"""`SweepRun`: the folder of one run of a sweep: what was asked, what is done, and the results.

    manifest.json            the sweep, the weights and versions that decide its numbers, under a digest
    ledger.sqlite            the state of every unit
    units/ab/KEY.safetensors the result of each finished unit

A file without its row in the ledger does not exist; a row whose file is missing is computed again. Reading changes
nothing in the folder, which may come from a stranger: no path is taken from it, and every file is held to its digest.
Nothing is written through a link that lies in it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from headwater.analyses._sweeps.kept import unpack
from headwater.analyses._sweeps.ledger import KEY, Ledger, Row
from headwater.analyses._sweeps.sweep import Sweep
from headwater.analyses._sweeps.texts import MOST_TEXTS
from headwater.analyses._sweeps.units import Units
from headwater.lens.errors import SweepError, as_short
from headwater.lens.files import as_path, digest_of, locked, parse_json, read_bytes, read_text, write_text

FORMAT = 1
MANIFEST, LEDGER, LOCK, UNITS = "manifest.json", "ledger.sqlite", "lock", "units"
MOST_MANIFEST = 2**30
MOST_UNIT = 2**32


@dataclass(frozen=True)
class Manifest:
    """What a run is of. `facts` are the digests and versions that decide the numbers beside the sweep itself.

    `base` leads from the folder to that of the sweep file; `shard` is (i, n) where the folder has one unit of n.
    """

    sweep: dict[str, Any]
    facts: dict[str, Any]
    base: str
    shard: tuple[int, int] | None = None

    @property
    def digest(self) -> str:
        """Of what decides the numbers; shards of one run share it."""
        return digest_of({"format": FORMAT, "sweep": self.sweep, "facts": self.facts})

    def write(self, path: Path) -> None:
        told = {"format": FORMAT, **asdict(self), "digest": self.digest}
        write_text(path, json.dumps(told, indent=1, allow_nan=False) + "\n", SweepError)

    @classmethod
    def read(cls, path: Path) -> Manifest:
        told = parse_json(read_text(path, MOST_MANIFEST, SweepError), str(path), SweepError)
        try:
            shard = told["shard"]
            number, of = (1, 1) if shard is None else shard
            if not (isinstance(told["sweep"], dict) and isinstance(told["facts"], dict)):
                raise ValueError("sweep and facts are objects")
            if not type(number) is type(of) is int:
                raise ValueError("a shard is two whole numbers")
            found = cls(
                told["sweep"], told["facts"], str(told["base"]), None if shard is None else (number, of)
            )
            right = told["format"] == FORMAT and told["digest"] == found.digest and 1 <= number <= of
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise SweepError(
                f"{path} is no manifest of a sweep ({type(error).__name__}: {error!s:.60})"
            ) from None
        if not right:
            raise SweepError(
                f"{path} was changed after it was written: its digest is another; begin a new run"
            )
        return found


class SweepRun:
    """A run folder, read.

    >>> import headwater as hw
    >>> hw.SweepRun("absent.run")
    Traceback (most recent call last):
    headwater.lens.errors.SweepError: absent.run holds no run of a sweep; give the folder that `headwater sweep` made
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.path = as_path(folder, SweepError)
        if not (self.path / MANIFEST).is_file():
            raise SweepError(
                f"{self.path} holds no run of a sweep; give the folder that `headwater sweep` made"
            )
        self.manifest = Manifest.read(self.path / MANIFEST)

    def __repr__(self) -> str:
        told = ", ".join(f"{count:,} {state}" for state, count in self.counts().items() if count)
        return f"SweepRun({str(self.path)!r}, {told})"

    @cached_property
    def sweep(self) -> Sweep:
        """What was asked."""
        return Sweep.of(self.manifest.sweep, str(self.path / MANIFEST))

    @cached_property
    def units(self) -> Units:
        """The units by their numbers; the texts of a corpus were counted when the run began."""
        texts = None if self.sweep.corpus is None else self.manifest.facts.get("texts")
        if self.sweep.corpus is not None and not (type(texts) is int and 0 < texts <= MOST_TEXTS):
            raise SweepError(
                f"{self.path / MANIFEST} does not say how many texts its corpus has; begin a new run"
            )
        return self.sweep.units_of(texts)

    def ledger(self) -> Ledger:
        """The ledger, to read."""
        return Ledger(self.path / LEDGER, readonly=True)

    def counts(self) -> dict[str, int]:
        """The number of units that are queued, done and failed."""
        with self.ledger() as ledger:
            return ledger.counts()

    def table(self) -> pd.DataFrame:
        """One line for each unit: what it is, its state, attempts, seconds, bytes, and why it failed."""
        lines = []
        with self.ledger() as ledger:
            for row in ledger.rows():
                unit = self.units[row.number]
                about = {"analysis": unit.analysis, "reads": unit.kind, "at": unit.at if unit.kind else None}
                about |= {
                    "layers": unit.layers,
                    "edits": unit.edits,
                    "seed": unit.seed,
                    "settings": unit.settings,
                }
                lines.append({**about, **asdict(row)})
        return pd.DataFrame(lines)

    def file(self, key: str) -> Path:
        """Where the result of a unit lies."""
        if not KEY.fullmatch(key):
            raise SweepError(f"{key!r:.80} is no key of a unit; a key has 64 hexadecimal digits")
        return self.path / UNITS / key[:2] / f"{key}.safetensors"

    def result(self, unit: str | int) -> Any:
        """The result of a unit by its key or number, as the analysis gave it. SweepError where it is not done."""
        with self.ledger() as ledger:
            rows = ledger.rows() if isinstance(unit, int) else iter(filter(None, [ledger.row(unit)]))
            row = next((row for row in rows if unit in (row.key, row.number)), None)
        if row is None or row.state != "done":
            why = (
                "there is no such unit" if row is None else f"it is {row.state}: {row.error or 'not run yet'}"
            )
            raise SweepError(f"unit {unit!r:.80} has no result: {why}")
        return self._read(row)[1]

    def results(self) -> Iterator[tuple[dict[str, Any], Any]]:
        """Each finished unit, as data, with its result, in the order of the units' numbers.

        `given` of a unit is its prompt or pair, and of a text of a corpus where it stands, how many of its tokens were
        read, and whether it was cut.
        """
        with self.ledger() as ledger:
            for row in ledger.rows("done"):
                unit = self.units[row.number].to_dict()
                there, result = self._read(row)
                yield (unit | {"given": there.get("given")} if unit["kind"] == "text" else unit), result

    def digest(self) -> str:
        """sha256 over the digests of all results: equal for two runs exactly when their results are, bit for bit."""
        with self.ledger() as ledger:
            return digest_of(sorted([row.key, row.digest] for row in ledger.rows("done")))

    def damaged(self) -> Iterator[Row]:
        """Units that are done and whose file is missing or another than the one that was written."""
        with self.ledger() as ledger:
            for row in ledger.rows("done"):
                if not self.is_whole(row):
                    yield row

    def strays(self) -> Iterator[Path]:
        """Files where results lie that are of no finished unit: nothing reads them."""
        with self.ledger() as ledger:
            for file in sorted((self.path / UNITS).rglob("*")):
                row = ledger.row(file.stem) if KEY.fullmatch(file.stem) else None
                if not file.is_dir() and not (row and row.state == "done" and file == self.file(row.key)):
                    yield file

    def is_whole(self, row: Row, look: bool = True) -> bool:
        """Whether the file of a unit is there as it was written; without `look` only its size is compared."""
        file = self.file(row.key)
        try:
            if file.is_symlink() or file.stat().st_size != row.bytes:
                return False
        except OSError:
            return False
        return not look or of_bytes(read_bytes(file, MOST_UNIT, SweepError)) == row.digest

    def _read(self, row: Row) -> tuple[dict[str, Any], Any]:
        """The unit, as its file tells it, and its result."""
        content = read_bytes(self.file(row.key), MOST_UNIT, SweepError)
        if of_bytes(content) != row.digest:
            raise SweepError(
                f"{self.file(row.key)} is another file than the one that was written; "
                "`headwater sweep resume --verify` computes it again"
            )
        return unpack(content, str(self.file(row.key)))


def of_bytes(content: bytes) -> str:
    """sha256 in hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()


def no_links(*paths: Path) -> None:
    """SweepError where a path that is to be written is a link: it could lead to any file of the user's."""
    if link := next((path for path in paths if path.is_symlink()), None):
        raise SweepError(
            f"{link} is a link, and a run writes through none; delete it, or give another folder"
        )


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Inside, no other process writes in the run folder. SweepError names the one that does."""
    path = folder / LOCK
    no_links(path, folder / MANIFEST, folder / LEDGER, folder / f"{LEDGER}-journal", folder / UNITS)
    with locked(path, SweepError, folder, named=True) as handle:
        with contextlib.suppress(OSError):  # on a full disk the lock holds all the same
            handle.truncate(0)
            handle.write(f"process {os.getpid()} on {platform.node()}".encode())
        yield


def begin(folder: Path, manifest: Manifest) -> SweepRun:
    """The run folder of that manifest: a new one, or the one that is there. SweepError where that is another run's."""
    if (folder / MANIFEST).is_file():
        there = Manifest.read(folder / MANIFEST)
        if told := _differing(there, manifest):
            raise SweepError(f"{folder} is of another run: {told}; give another folder")
        return SweepRun(folder)
    if {path.name for path in folder.iterdir()} - {LOCK}:
        raise SweepError(f"{folder} holds other files; give a folder that is new or empty")
    manifest.write(folder / MANIFEST)
    return SweepRun(folder)


def _differing(there: Manifest, here: Manifest) -> str:
    """The first thing in which two runs differ, in words."""
    if there.shard != here.shard:
        return f"shard {as_short(there.shard)} there and {as_short(here.shard)} here"
    for name, one, other in (("", there.facts, here.facts), ("sweep: ", there.sweep, here.sweep)):
        for key in sorted(one.keys() | other.keys()):
            if one.get(key) != other.get(key):
                return f"{name}{key} is {as_short(one.get(key))} there and {as_short(other.get(key))} here"
    return ""


def facts_differing(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """The first fact in which a worker differs from its run, in words; empty where there is none."""
    wrong = next((key for key in sorted(there) if here.get(key) != there[key]), None)
    return "" if wrong is None else f"{wrong} is {as_short(here.get(wrong))} and not {as_short(there[wrong])}"
