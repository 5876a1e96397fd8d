"""The ledger: one row for each unit, kept by kills of its writer, and read from strangers without harm."""

import contextlib
import sqlite3
import subprocess
import sys

import pytest

from headwater.analyses._sweeps.ledger import Ledger, Row
from headwater.lens.errors import SweepError

KEYS = [f"{n:064x}" for n in range(4)]


def test_rows_go_from_queued_to_done_or_failed(tmp_path):
    path = tmp_path / "ledger.sqlite"
    with Ledger(path) as ledger:
        ledger.add(zip(KEYS, range(4), strict=True))
        with ledger.writing():
            ledger.done(KEYS[1], "d" * 64, 10, 0.5)
            ledger.tried(KEYS[2], "died")
            ledger.failed(KEYS[3], "x" * 5000)
        ledger.add([(KEYS[1], 1)])  # once more changes nothing
    with Ledger(path, readonly=True) as ledger:
        assert ledger.counts() == {"queued": 2, "done": 1, "failed": 1}
        assert ledger.totals() == (10, 0.5)
        assert [row.number for row in ledger.rows("queued")] == [0, 2]
        assert ledger.row(KEYS[1]) == Row(KEYS[1], 1, "done", 0, "d" * 64, 10, 0.5, None)
        assert ledger.row(KEYS[2]).attempts == 1
        assert len(ledger.row(KEYS[3]).error) == 2000
        with pytest.raises(SweepError, match="readonly"):
            ledger.queue(KEYS[1])


def test_a_transaction_that_is_left_by_an_error_changes_nothing(tmp_path):
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        ledger.add(zip(KEYS, range(4), strict=True))
        with contextlib.suppress(ZeroDivisionError), ledger.writing():
            ledger.failed(KEYS[0], "no")
            raise ZeroDivisionError
        assert ledger.counts()["queued"] == 4


def test_every_change_is_synced_and_no_log_lies_beside(tmp_path):
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        assert ledger.base.execute("PRAGMA synchronous").fetchone() == (2,)
        assert ledger.base.execute("PRAGMA journal_mode").fetchone() == ("delete",)
        assert ledger.base.execute("PRAGMA trusted_schema").fetchone() == (0,)


def test_a_writer_killed_inside_a_transaction_loses_it_alone(tmp_path):
    """The journal is on the disk and half of the transaction too: readers see what was before, and change nothing."""
    path = tmp_path / "ledger.sqlite"
    with Ledger(path) as ledger:
        ledger.add((f"{n:064x}", n) for n in range(20_000))
    code = (
        "import os, sys\nfrom pathlib import Path\nfrom headwater.analyses._sweeps.ledger import Ledger\n"
        "ledger = Ledger(Path(sys.argv[1]))\nledger.base.execute('PRAGMA cache_size=5')\n"
        "with ledger.writing():\n    for n in range(20_000):\n        ledger.failed(f'{n:064x}', 'x' * 500)\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    assert subprocess.run([sys.executable, "-c", code, path]).returncode == -9
    assert path.with_name("ledger.sqlite-journal").stat().st_size > 0
    before = path.read_bytes()
    with Ledger(path, readonly=True) as ledger:
        assert ledger.counts() == {"queued": 20_000, "done": 0, "failed": 0}
    assert path.read_bytes() == before
    with Ledger(path) as ledger:
        assert ledger.counts() == {"queued": 20_000, "done": 0, "failed": 0}
        assert ledger.base.execute("PRAGMA integrity_check").fetchone() == ("ok",)


@pytest.mark.parametrize(
    "script",
    [
        "CREATE TABLE other (a)",
        "CREATE TRIGGER t AFTER UPDATE ON units BEGIN DELETE FROM units; END",
        "CREATE VIEW v AS SELECT * FROM units",
    ],
)
def test_other_tables_are_refused(tmp_path, script):
    path = tmp_path / "ledger.sqlite"
    with Ledger(path):
        pass
    with sqlite3.connect(path) as base:
        base.execute(script)
    base.close()
    with pytest.raises(SweepError, match="is no ledger"):
        Ledger(path, readonly=True)


def test_rows_and_files_that_no_ledger_has_are_refused(tmp_path):
    path = tmp_path / "ledger.sqlite"
    with pytest.raises(SweepError, match="missing"):
        Ledger(path, readonly=True)
    with Ledger(path) as ledger:
        ledger.base.execute("INSERT INTO units VALUES ('../../x', 0, 'done', 0, '', 1, 1, NULL)")
    with Ledger(path, readonly=True) as ledger, pytest.raises(SweepError, match="no ledger has"):
        list(ledger.rows())
    path.write_bytes(b"no database at all" * 100)
    with pytest.raises(SweepError, match="is no ledger"):
        Ledger(path, readonly=True)


@pytest.mark.parametrize("value", ["9e999", "CAST(x'd57d' AS TEXT)"])
def test_damaged_values_are_one_line_wherever_they_are_read(tmp_path, value):
    path = tmp_path / "ledger.sqlite"
    with Ledger(path) as ledger:
        for column in ("key", "state", "bytes", "seconds"):
            row = dict.fromkeys(("key", "state", "bytes", "seconds"), "1") | {
                "state": "'done'",
                column: value,
            }
            key = row["key"] if column == "key" else f"'{column:a<64}'"
            ledger.base.execute(
                f"INSERT INTO units VALUES ({key}, 0, {row['state']}, 0, '', {row['bytes']}, {row['seconds']}, NULL)"
            )
    with Ledger(path, readonly=True) as ledger:
        for read in (ledger.totals, ledger.counts, lambda: list(ledger.rows()), lambda: ledger.row("a" * 64)):
            with contextlib.suppress(SweepError):
                read()
