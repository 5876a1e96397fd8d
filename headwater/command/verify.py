"""`headwater verify`: every byte of a saved file is held to the digests in it, and its content to its form."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from headwater.lens.errors import HeadwaterError
from headwater.lens.files import parse_json, read_text

MOST_BYTES = 2**32


def verify(
    files: Annotated[
        list[Path],
        typer.Argument(help="Records, results, corpora, experiments, circuits, sweeps, folders of runs."),
    ],
) -> None:
    """Say what saved files hold, and whether they are as they were written."""
    wrong = False
    for file in files:
        try:
            typer.echo(f"{file}: {held(file)}")
        except HeadwaterError as error:
            typer.echo(f"headwater: {' '.join(str(error).split())}", err=True)
            wrong = True
    if wrong:
        raise typer.Exit(2)


def held(path: Path) -> str:
    """What the file holds, in one line; HeadwaterError says what is wrong with it."""
    if path.is_dir():
        return _run(path)
    if path.suffix == ".safetensors":
        return _record(path)
    if path.suffix == ".json":
        content = parse_json(read_text(path, MOST_BYTES, HeadwaterError), str(path), HeadwaterError)
        if isinstance(content, dict) and "digest" in content:
            return _results(path)
        if isinstance(content, dict) and "analyses" in content:
            return _sweep(path)
        if isinstance(content, dict) and "prompts" in content:
            return _experiment(path)
    if path.suffix not in (".json", ".graphml"):
        raise HeadwaterError(
            f"{path} is none of the files that Headwater saves: records and corpora end in .safetensors, "
            "results, experiments, sweeps and circuits in .json or .graphml, and a run of a sweep is a folder"
        )
    return _circuit(path)


def _record(path: Path) -> str:
    from headwater.analyses._corpora.result import Corpus
    from headwater.analyses._corpora.saved import is_corpus
    from headwater.lens.records.record import Record

    if is_corpus(path):
        return f"{Corpus.open(path, verify=True)!r}: every array has its digest"
    found = Record.open(path, verify=True)
    return f"{found!r}: every tensor has its digest"


def _results(path: Path) -> str:
    from headwater.lens.experiments.results import Results

    found = Results.open(path)
    return f"results of {len(found.results)} prompts with {found.model}: the digest agrees"


def _experiment(path: Path) -> str:
    from headwater.lens.experiments.experiment import Experiment

    found = Experiment.open(path)
    files = found.check_files(path.resolve().parent)
    told = f", its {files} pictures and sounds are those that were meant" if files else ""
    return f"an experiment with {found.model} on {len(found.prompts)} prompts{told}; it holds no digest of itself"


def _sweep(path: Path) -> str:
    from headwater.analyses._sweeps.sweep import Sweep

    found = Sweep.open(path)
    units = len(found.units(path.resolve().parent))
    return f"a sweep of {units:,} units with {found.model}; it holds no digest of itself"


def _run(path: Path) -> str:
    from headwater.analyses._sweeps.sweep_run import SweepRun

    found = SweepRun(path)
    counts = ", ".join(f"{count:,} {state}" for state, count in found.counts().items())
    if damaged := [found.file(row.key) for row in found.damaged()]:
        raise HeadwaterError(
            f"{path}: {len(damaged):,} files are missing or were changed, first {damaged[0]}; "
            "`headwater sweep resume --verify` computes them again"
        )
    strays = sum(1 for _ in found.strays())
    told = f"; {strays:,} other files in it are never read" if strays else ""
    return f"a run of a sweep with {found.sweep.model}, {counts}: every file has the digest of its row{told}"


def _circuit(path: Path) -> str:
    from headwater.analyses.circuits._graph_files import read_circuit

    found = read_circuit(path)
    return (
        f"a circuit of {len(found)} nodes and {found.number_of_edges()} edges; it holds no digest of itself"
    )
