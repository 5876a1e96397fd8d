"""`Ledger`: the state of every unit of a run in one SQLite file, written by one process.

Each change is on the disk before the next one begins (`journal_mode=DELETE`, `synchronous=FULL`). A unit is `queued`
until its file lies in its place, then `done` with the file's digest, or `failed` with the reason.
"""

from __future__ import annotations

import math
import re
import shutil
import sqlite3
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from headwater.lens.errors import SweepError

TABLE = (
    "CREATE TABLE units (key TEXT PRIMARY KEY, number INTEGER NOT NULL, state TEXT NOT NULL, "
    "attempts INTEGER NOT NULL, digest TEXT, bytes INTEGER, seconds REAL, error TEXT) WITHOUT ROWID"
)
STATES = ("queued", "done", "failed")
KEY = re.compile(r"[0-9a-f]{64}")
FAULTS = (sqlite3.Error, UnicodeDecodeError)  # what SQLite says of a broken table may be no text
LONGEST = 2000  # letters of a reason
LARGEST_VALUE = 2**20
BUSY_SECONDS = 10.0


@dataclass(frozen=True)
class Row:
    """One unit as the ledger knows it."""

    key: str
    number: int
    state: str
    attempts: int
    digest: str | None
    bytes: int | None
    seconds: float | None
    error: str | None


class Ledger:
    """The open file. `readonly` changes nothing, and takes a file from a stranger."""

    def __init__(self, path: Path, readonly: bool = False) -> None:
        self.path, self.readonly = path, readonly
        self._copy: tempfile.TemporaryDirectory[str] | None = None
        if readonly and not path.is_file():
            raise SweepError(f"{path} is missing or no plain file; `headwater sweep resume` makes a new one")
        try:
            self.base = self._opened(path)
        except sqlite3.OperationalError:
            if not readonly:
                raise SweepError(f"{path} can not be opened; take a folder that can be written") from None
            self.base = self._mended(path)
        except FAULTS as error:
            raise self._none(error) from None

    def _mended(self, path: Path) -> sqlite3.Connection:
        """A copy: the last writer was killed while it wrote, and SQLite mends it from the journal beside it."""
        self._copy = tempfile.TemporaryDirectory(prefix="headwater-")
        for file in (path, path.with_name(path.name + "-journal")):
            if file.is_file():
                shutil.copyfile(file, Path(self._copy.name) / file.name)
        self.readonly = False
        try:
            return self._opened(Path(self._copy.name) / path.name)
        except FAULTS as error:
            self._copy.cleanup()
            raise self._none(error) from None

    def _none(self, error: Exception) -> SweepError:
        return SweepError(f"{self.path} is no ledger of a sweep ({error}); delete it, and resume")

    def _opened(self, path: Path) -> sqlite3.Connection:
        mode = "ro" if self.readonly else "rwc"
        address = f"file:{quote(str(path.resolve()))}?mode={mode}"
        base = sqlite3.connect(address, uri=True, timeout=BUSY_SECONDS, isolation_level=None)
        try:
            self._look(base)
        except BaseException:
            base.close()
            raise
        return base

    def _look(self, base: sqlite3.Connection) -> None:
        """Set what guards against a stranger's file, and hold the file to the one table of a ledger."""
        base.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, LARGEST_VALUE)
        for pragma in ("trusted_schema=OFF", "cell_size_check=ON", "synchronous=FULL"):
            base.execute(f"PRAGMA {pragma}")
        if not self.readonly:
            base.execute("PRAGMA journal_mode=DELETE")
        there = base.execute("SELECT sql FROM sqlite_master").fetchall()
        if not there and not self.readonly:
            base.execute(TABLE)
        elif [text for (text,) in there] != [TABLE]:
            raise sqlite3.DatabaseError("it has other tables than a ledger's")

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *error: object) -> None:
        self.base.close()
        if self._copy is not None:
            self._copy.cleanup()

    def add(self, units: Iterable[tuple[str, int]]) -> None:
        """Enter units (key, number) as queued, all or none; those that are there stay as they are."""
        empty = "INSERT OR IGNORE INTO units VALUES (?, ?, 'queued', 0, NULL, NULL, NULL, NULL)"
        with self.writing():
            try:
                self.base.executemany(empty, units)
            except FAULTS as error:
                raise unwritten(self.path, error) from None

    def writing(self) -> _Transaction:
        """Inside, changes go to the disk together, at the end."""
        return _Transaction(self)

    def done(self, key: str, digest: str, size: int, seconds: float) -> None:
        self._set(key, "state='done', digest=?, bytes=?, seconds=?, error=NULL", digest, size, seconds)

    def failed(self, key: str, reason: str) -> None:
        self._set(key, "state='failed', digest=NULL, bytes=NULL, seconds=NULL, error=?", reason[:LONGEST])

    def tried(self, key: str, reason: str) -> None:
        """Count one attempt that came to nothing."""
        self._set(key, "attempts=attempts+1, error=?", reason[:LONGEST])

    def queue(self, key: str) -> None:
        """Take a unit up anew."""
        self._set(key, "state='queued', attempts=0, digest=NULL, bytes=NULL, seconds=NULL")

    def put(self, row: Row) -> None:
        """Enter a row as another ledger has it."""
        values = tuple(getattr(row, name) for name in Row.__dataclass_fields__)
        self._run(f"INSERT OR REPLACE INTO units VALUES ({', '.join('?' * len(values))})", values)

    def counts(self) -> dict[str, int]:
        """The number of units in each state."""
        found = dict(self._read("SELECT state, count(*) FROM units GROUP BY state"))
        return {state: int(found.get(state, 0)) for state in STATES}

    def totals(self) -> tuple[int, float]:
        """Bytes and seconds of the units that are done."""
        asked = "SELECT total(bytes), total(seconds) FROM units WHERE state='done'"
        size, seconds = next(self._read(asked))
        if not (math.isfinite(size) and math.isfinite(seconds)):
            raise self._foreign()
        return int(size), float(seconds)

    def rows(self, state: str | None = None) -> Iterator[Row]:
        """Rows in the order of the units' numbers, checked."""
        where, values = ("WHERE state=?", (state,)) if state else ("", ())
        yield from map(
            self._checked, self._read(f"SELECT * FROM units {where} ORDER BY number, key", *values)
        )

    def row(self, key: str) -> Row | None:
        found = next(self._read("SELECT * FROM units WHERE key=?", key), None)
        return None if found is None else self._checked(found)

    def _checked(self, found: tuple[Any, ...]) -> Row:
        row = Row(*found)
        kinds = ((row.number, int), (row.attempts, int), (row.bytes or 0, int), (row.digest or "", str))
        right = isinstance(row.key, str) and KEY.fullmatch(row.key) and row.state in STATES
        if not right or not all(isinstance(value, kind) for value, kind in kinds):
            raise self._foreign()
        return row

    def _foreign(self) -> SweepError:
        return SweepError(f"{self.path} holds a row that no ledger has; delete it, and resume")

    def _set(self, key: str, change: str, *values: Any) -> None:
        self._run(f"UPDATE units SET {change} WHERE key=?", (*values, key))

    def _read(self, text: str, *values: Any) -> Iterator[tuple[Any, ...]]:
        """The rows that are asked for, each read when it is taken: what is broken may come late."""
        found = self._run(text, values)
        while True:
            try:
                row = next(found, None)
            except FAULTS as error:
                raise unwritten(self.path, error) from None
            if row is None:
                return
            yield row

    def _run(self, text: str, values: tuple[Any, ...]) -> sqlite3.Cursor:
        try:
            return self.base.execute(text, values)
        except FAULTS as error:
            raise unwritten(self.path, error) from None


class _Transaction:
    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger

    def __enter__(self) -> None:
        self._execute("BEGIN IMMEDIATE")

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is None:
            self._execute("COMMIT")
        elif self.ledger.base.in_transaction:
            self.ledger.base.execute("ROLLBACK")

    def _execute(self, text: str) -> None:
        try:
            self.ledger.base.execute(text)
        except FAULTS as error:
            raise unwritten(self.ledger.path, error) from None


def unwritten(path: Path, error: Exception) -> SweepError:
    """What is said where the ledger can not be read or written."""
    return SweepError(f"{path}: {error}; make room or mend the disk, then `headwater sweep resume`")
