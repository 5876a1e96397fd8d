"""`merge_runs`: the shards of one sweep as one run folder."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace

from headwater.analyses._sweeps.ledger import Ledger, Row
from headwater.analyses._sweeps.sweep_run import LEDGER, MOST_UNIT, SweepRun, alone, begin, no_links, of_bytes
from headwater.lens.errors import SweepError
from headwater.lens.files import as_path, read_bytes, write_bytes

TOGETHER = 500  # rows of one transaction


def merge_runs(
    folders: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str],
    tell: Callable[[int, int], object] = lambda done, of: None,
) -> SweepRun:  # fmt: skip
    """Copy what is done in `folders`, runs of one sweep on the same weights and versions, into the folder `out`.

    The order of the folders changes nothing. What is done twice must have the same digest. `out` may hold an earlier
    merge, which goes on. A unit that no folder has is missing from `out` until its run is resumed. SweepError where a
    folder is of another run, or a file is not what was written.

    >>> import headwater as hw, tempfile
    >>> sweep = hw.Sweep(
    ...     model="tasks-4l", prompts=["Mary gave John a drink"], analyses=[{"analysis": "rollout"}]
    ... )
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = hw.run_sweep(sweep, f"{folder}/one", workers=1, shard=(1, 1))
    ...     print(hw.merge_runs([f"{folder}/one"], f"{folder}/whole").counts())
    {'queued': 0, 'done': 1, 'failed': 0}
    """
    runs = [SweepRun(folder) for folder in folders]
    if not runs:
        raise SweepError("no folder was given; give the shards of a sweep")
    path = as_path(out, SweepError)
    first = runs[0]
    for run in runs[1:]:
        if run.manifest.digest != first.manifest.digest:
            raise SweepError(f"{run.path} and {first.path} are of different runs; merge shards of one sweep")
    path.mkdir(parents=True, exist_ok=True)
    base = os.path.relpath(os.path.normpath(first.path.resolve() / first.manifest.base), path.resolve())
    counts = [run.counts() for run in runs]
    total, settled = sum(sum(each.values()) for each in counts), 0
    with alone(path):
        merged = begin(path, replace(first.manifest, base=base, shard=None))
        with Ledger(path / LEDGER) as ledger:
            for run in runs:
                with run.ledger() as theirs:
                    rows = list(theirs.rows())
                ledger.add((row.key, row.number) for row in rows)
                for start in range(0, len(rows), TOGETHER):
                    with ledger.writing():
                        for row in rows[start : start + TOGETHER]:
                            _take(row, run, merged, ledger)
                    settled += len(rows[start : start + TOGETHER])
                    tell(settled, total)
    return merged


def _take(row: Row, run: SweepRun, merged: SweepRun, ledger: Ledger) -> None:
    """Take one unit over, its file first."""
    here = ledger.row(row.key)
    if here is None or row.state == "queued":
        return
    if here.state == "done":
        if row.state == "done" and row.digest != here.digest:
            raise SweepError(
                f"unit {row.number} has other numbers in {run.path} than in {merged.path}; compute it again"
            )
        return
    if row.state == "done":
        content = read_bytes(run.file(row.key), MOST_UNIT, SweepError)
        if of_bytes(content) != row.digest:
            raise SweepError(
                f"{run.file(row.key)} is another file than the one that was written; "
                "delete it and resume that run first"
            )
        target = merged.file(row.key)
        no_links(target.parent, target)
        target.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(target, content, SweepError)
    ledger.put(row)
