"""`headwater experiment`: runs an experiment file, or verifies its results."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from headwater.command import completion
from headwater.command.options import AsJson
from headwater.command.waiting import counted


def experiment(
    file: Annotated[Path, typer.Argument(help="Experiment file (JSON), as the dashboard saves it.")],
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            help="Take this model; its weights must be those named.",
            autocompletion=completion.models,
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Run an experiment file and write results beside it, or verify those that are there."""
    from headwater.command import inputs, output
    from headwater.lens.experiments.run_file import run_file

    loaded = None if model is None else inputs.model(model)
    with counted("Running") as tell:
        found = run_file(file, loaded, tell)
    typer.echo(found.results.to_json() if as_json else output.outcome(found), nl=not as_json)
    if found.verified is False:
        raise typer.Exit(1)
