"""`headwater verify`: every byte of a saved file is held to the digests in it, and its content to its form."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from headwater.lens.errors import HeadwaterError
from headwater.lens.files import parse_json, read_text

MOST_BYTES = 2**32


def verify(
    files: Annotated[list[Path], typer.Argument(help="Records, results, corpora, experiments, circuits.")],
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
    if path.suffix == ".safetensors":
        return _record(path)
    if path.suffix == ".json":
        content = parse_json(read_text(path, MOST_BYTES, HeadwaterError), str(path), HeadwaterError)
        if isinstance(content, dict) and "digest" in content:
            return _results(path)
        if isinstance(content, dict) and "prompts" in content:
            return _experiment(path)
    if path.suffix not in (".json", ".graphml"):
        raise HeadwaterError(
            f"{path} is none of the files that Headwater saves: records and corpora end in .safetensors, "
            "results, experiments and circuits in .json or .graphml"
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


def _circuit(path: Path) -> str:
    from headwater.analyses.circuits._graph_files import read_circuit

    found = read_circuit(path)
    return (
        f"a circuit of {len(found)} nodes and {found.number_of_edges()} edges; it holds no digest of itself"
    )
