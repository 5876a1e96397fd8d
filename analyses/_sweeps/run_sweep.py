"""`run_sweep`: run a sweep in a folder, or take up the run that is there."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, Literal

import torch

from headwater.analyses._corpora.shards import Shard
from headwater.analyses._sweeps.drive import Driver
from headwater.analyses._sweeps.fits import refuse_misfit
from headwater.analyses._sweeps.ledger import Ledger
from headwater.analyses._sweeps.processes import Engine, Processes
from headwater.analyses._sweeps.reading import Reading
from headwater.analyses._sweeps.sweep import Sweep
from headwater.analyses._sweeps.sweep_run import LEDGER, Manifest, SweepRun, alone, begin
from headwater.analyses._sweeps.texts import Texts
from headwater.analyses._sweeps.worker import Setup, facts_of, open_model
from headwater.lens.errors import SweepError
from headwater.lens.files import as_path

Kind = Literal["local", "ray"]


def run_sweep(
    sweep: Sweep, folder: str | os.PathLike[str], *, base: str | os.PathLike[str] = ".", workers: int | None = None,
    engine: Kind = "local", shard: tuple[int, int] | None = None, model: str | None = None, again: bool = False,
    verify: bool = False, say: Callable[[str], object] = lambda text: None,
    tell: Callable[[int, int], object] = lambda done, of: None,
) -> SweepRun:  # fmt: skip
    """Run every unit of a sweep that is not done yet, and keep each result in `folder` as soon as it is there.

    `base` is the folder of the sweep file, for models, pictures and records that it names. `workers` (None: as many as
    the processors allow, one on a GPU) are processes, each with a model of its own and `sweep.threads` threads;
    `engine="ray"` makes them actors of a Ray cluster. `shard=(i, n)` runs the i-th of n parts, each in a folder of its
    own (`merge_runs`). `model` is a folder that takes the place of the named one. Units that failed are left, but for
    `again`. A unit whose file is missing or has another size is computed again, and with `verify`, which reads every
    file, one whose file was changed. `say` hears lines of text, `tell(settled, of)` the progress. The numbers of a unit
    are those of the analysis called directly with the same threads, bit for bit, whatever the engine. SweepError where
    the folder is of another run, is in use, or has no room.

    >>> import headwater as hw, tempfile
    >>> sweep = hw.Sweep(
    ...     model="tasks-4l", prompts=["Mary gave John a drink"], analyses=[{"analysis": "rollout"}]
    ... )
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     run = hw.run_sweep(sweep, folder, workers=1)
    ...     print(run.counts(), run.result(0).dims)
    {'queued': 0, 'done': 1, 'failed': 0} ('batch', 'query', 'key')
    """
    path, place = as_path(folder, SweepError), as_path(base, SweepError)
    part = Shard.checked(shard or (1, 1), SweepError)
    if workers is not None and workers < 1:
        raise SweepError(f"workers={workers} compute nothing; give 1 or more")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SweepError(f"can not write {path}: {error.strerror}; give another folder") from None
    with alone(path):
        opened = open_model(sweep, place, model)
        facts = facts_of(sweep, opened, place)
        facts |= Texts(sweep.corpus, place).facts() if sweep.corpus else {}
        refuse_misfit(sweep, opened, place)
        manifest = Manifest(
            sweep.model_dump(mode="json"), facts, os.path.relpath(place.resolve(), path.resolve()), shard
        )
        run = begin(path, manifest)
        with Ledger(path / LEDGER) as ledger:
            ledger.add(Reading(sweep, opened, facts, place).keys(run.units, part))
            del opened  # the workers open their own, on the same GPU if need be
            gc.collect()
            if sweep.device == "cuda":
                torch.cuda.empty_cache()
            _requeue(run, ledger, again, verify)
            counts = ledger.counts()
            say(f"{sum(counts.values()):,} units in {path}")
            if counts["queued"]:
                setup = Setup(str(place.resolve()), str(path.resolve()), model)
                many = min(workers or most_workers(sweep, engine), counts["queued"])
                with closing(_engine(engine, setup, sweep, many)) as started:
                    Driver(run, ledger, started, many, say, tell).drive()
    return run


def most_workers(sweep: Sweep, engine: Kind) -> int:
    """As many as the processors of this process allow; one where all of them would take the same GPU."""
    if sweep.device == "cuda" and engine == "local":
        return 1
    some = getattr(os, "sched_getaffinity", None)  # Linux alone says which processors a process may use
    return max(1, (len(some(0)) if some else os.cpu_count() or 1) // sweep.threads)


def resume(
    folder: str | os.PathLike[str], *, base: str | os.PathLike[str] | None = None,
    say: Callable[[str], object] = lambda text: None, **how: Any,
) -> SweepRun:  # fmt: skip
    """Take up the run in a folder, with the settings of `run_sweep`; SweepError where what decides it has changed.

    Without `base` the files that the sweep names are looked for where its manifest says, if that is the folder of the
    run or the one in which it lies. A manifest that leads elsewhere is not followed, because it may be a stranger's:
    the files are looked for in the folder of the run, and `say` hears of it.
    """
    run = SweepRun(folder)
    if base is None:
        base = run.path
        there = Path(os.path.normpath(run.path.resolve() / run.manifest.base))
        if there == run.path.resolve().parent:
            base = there
        elif there != run.path.resolve():
            say(
                f"files that the sweep names are looked for in {run.path}, not in {there}: give that as base to do so"
            )
    return run_sweep(run.sweep, run.path, base=base, shard=run.manifest.shard, say=say, **how)


def _engine(kind: Kind, setup: Setup, sweep: Sweep, workers: int) -> Engine:
    if kind == "local":
        return Processes(setup, sweep.threads)
    if kind == "ray":
        from headwater.analyses._sweeps.ray_actors import RayActors

        return RayActors(setup, sweep.threads, workers, sweep.device == "cuda")
    raise SweepError(f"engine {kind!r} is unknown; give 'local' or 'ray'")


def _requeue(run: SweepRun, ledger: Ledger, again: bool, verify: bool) -> None:
    """Units whose file is missing or cut short are computed again, and with `again` those that failed."""
    lost = [row.key for row in ledger.rows("done") if not run.is_whole(row, look=verify)]
    lost += [row.key for row in ledger.rows("failed")] if again else []
    if lost:
        with ledger.writing():
            for key in lost:
                ledger.queue(key)
