"""`headwater sweep`: runs a sweep file in a folder, says how a run stands, takes one up, joins shards, writes a table.

headwater sweep FILE                    # into FILE's name with .run
headwater sweep FILE --shard 3/8        # one part of eight, for a job array
headwater sweep status DIR
headwater sweep resume DIR
headwater sweep merge DIR DIR --out DIR
headwater sweep export DIR --out FILE   # one table
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from headwater.analyses._corpora.shards import Shard
from headwater.command.options import AsJson
from headwater.command.waiting import counted
from headwater.lens.errors import SweepError

if TYPE_CHECKING:
    from headwater.analyses._sweeps.sweep_run import SweepRun

BETWEEN = 30.0  # seconds between lines of progress where no terminal shows a bar
SHOWN = 5  # reasons of failures that are printed


class _FileFirst(TyperGroup):
    """`headwater sweep FILE` is `headwater sweep run FILE`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in (*self.commands, "--help"):
            args = ["run", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(cls=_FileFirst, no_args_is_help=True, rich_markup_mode=None)

Folder = Annotated[Path, typer.Argument(help="Folder of a run.")]
Workers = Annotated[
    int | None, typer.Option("--workers", "-n", help="Processes, each with a model of its own.", min=1)
]
EngineName = Annotated[
    Literal["local", "ray"],
    typer.Option("--engine", help="Processes of this machine, or workers of a Ray cluster."),
]
OwnModel = Annotated[
    str | None, typer.Option("--model", "-m", help="Take the model in this folder in the named one's place.")
]
Again = Annotated[bool, typer.Option("--again", help="Run units that failed once more.")]


@app.callback()
def sweep() -> None:
    """Run a sweep file: many prompts, layers, analyses, edits and seeds; status, resume, merge and export of runs."""


@app.command()
def run(
    file: Annotated[Path, typer.Argument(help="Sweep file (JSON).")],
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder of the run; else beside the file, named like it.")
    ] = None,
    workers: Workers = None,
    engine: EngineName = "local",
    shard: Annotated[
        str | None, typer.Option("--shard", help="i/n: the i-th of n parts, in a folder of its own.")
    ] = None,
    model: OwnModel = None,
    again: Again = False,
    as_json: AsJson = False,
) -> None:
    """Run every unit of a sweep that is not done yet."""
    from headwater.analyses._sweeps.run_sweep import run_sweep
    from headwater.analyses._sweeps.sweep import Sweep

    asked, part = Sweep.open(file), None if shard is None else Shard.parse(shard, SweepError)
    ending = ".run" if part is None else f".{part[0]}-of-{part[1]}.run"
    folder = out or file.with_name(file.stem + ending)
    with _watched() as (say, tell):
        found = run_sweep(
            asked, folder, base=file.resolve().parent, workers=workers, engine=engine, shard=part, model=model,
            again=again, say=say, tell=tell,
        )  # fmt: skip
    _told(found, as_json)


@app.command()
def resume(
    folder: Folder,
    base: Annotated[
        Path | None,
        typer.Option(
            "--base", help="Folder of the files that the sweep names; else beside or in the run's folder."
        ),
    ] = None,
    workers: Workers = None,
    engine: EngineName = "local",
    model: OwnModel = None,
    again: Again = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Hold every file to its digest, and compute changed ones again.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Take up a run that was stopped."""
    from headwater.analyses._sweeps import run_sweep

    with _watched() as (say, tell):
        found = run_sweep.resume(
            folder, base=base, workers=workers, engine=engine, model=model, again=again, verify=verify, say=say,
            tell=tell,
        )  # fmt: skip
    _told(found, as_json)


@app.command()
def status(
    folder: Folder,
    verify: Annotated[bool, typer.Option("--verify", help="Hold every file to its digest.")] = False,
    as_json: AsJson = False,
) -> None:
    """Say how a run stands; nothing in it is changed."""
    from headwater.analyses._sweeps.sweep_run import SweepRun

    found = SweepRun(folder)
    damaged = [str(found.file(row.key)) for row in found.damaged()] if verify else []
    _told(found, as_json, damaged)


@app.command()
def merge(
    folders: Annotated[list[Path], typer.Argument(help="Folders of runs: the shards of one sweep.")],
    out: Annotated[Path, typer.Option("--out", help="Folder of the whole run.")],
    as_json: AsJson = False,
) -> None:
    """Join the shards of a sweep in one folder."""
    from headwater.analyses._sweeps.merge import merge_runs

    with _watched() as (_, tell):
        found = merge_runs(folders, out, tell=tell)
    _told(found, as_json)


@app.command()
def export(
    folder: Folder,
    out: Annotated[Path, typer.Option("--out", "-o", help="The table: a .parquet or .csv file.")],
) -> None:
    """Write the numbers of every finished unit as one table, a line each."""
    from headwater.analyses._sweeps.export import export_sweep
    from headwater.analyses._sweeps.sweep_run import SweepRun

    found = SweepRun(folder)
    with _watched() as (_, tell):
        export_sweep(found, out, tell=tell)
    counts = found.counts()
    rest = f"; {counts['queued']:,} queued and {counts['failed']:,} failed ones are not in it"
    typer.echo(f"{out}: {counts['done']:,} units{rest if counts['queued'] or counts['failed'] else ''}")


@contextmanager
def _watched() -> Iterator[tuple[Callable[[str], None], Callable[[int, int], None]]]:
    """Lines on standard error, and progress: a bar in a terminal, else a line now and then."""
    begun = last = time.monotonic()
    first: list[int] = []

    def say(text: str) -> None:
        typer.echo(text, err=True)

    def lines(done: int, of: int) -> None:
        nonlocal last
        first.append(done) if not first else None
        now = time.monotonic()
        if now - last >= BETWEEN and done > first[0]:
            last = now
            left = (now - begun) * (of - done) / (done - first[0])
            say(f"{done:,} of {of:,} units, about {left / 60:.0f} min left")

    with counted("Units") as bar:
        yield say, lines if bar is None else bar


def _told(found: SweepRun, as_json: bool, damaged: list[str] | None = None) -> None:
    """Print the state of a run. Exit code 1 where a unit has failed or a file is damaged."""
    import json

    counts = found.counts()
    with found.ledger() as ledger:
        size, seconds = ledger.totals()
        reasons = [
            (row.number, str(row.error)) for row, _ in zip(ledger.rows("failed"), range(SHOWN), strict=False)
        ]
    told = {"folder": str(found.path), **counts, "bytes": size, "seconds": seconds, "digest": found.digest()}
    told |= {"reasons": [list(each) for each in reasons], "damaged": damaged or []}
    if as_json:
        typer.echo(json.dumps(told, indent=1))
    else:
        states = ", ".join(f"{count:,} {state}" for state, count in counts.items())
        typer.echo(f"{found.path}: {states}; {size:,} bytes, {seconds:,.0f} seconds of computing")
        for number, reason in reasons:
            typer.echo(f"unit {number} failed: {' '.join(reason.split())}")
        for name in damaged or []:
            typer.echo(f"{name} is missing or was changed; headwater sweep resume --verify computes it again")
        typer.echo(f"results {told['digest']}")
    if counts["failed"] or damaged:
        sys.stdout.flush()
        raise typer.Exit(1)
