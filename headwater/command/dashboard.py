"""`headwater dashboard`."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from headwater.command import completion
from headwater.command.waiting import extra


def dashboard(
    model: Annotated[
        list[str] | None,
        typer.Argument(
            help="Models, or files of records and corpora, to open; the first is shown first. smollm2-135m, or "
            "else an embedded model, if left out.",
            autocompletion=completion.models,
        ),
    ] = None,
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="First port to try.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; only loopback is private.")] = "127.0.0.1",
    prompt: Annotated[str | None, typer.Option(help="Text to begin with.")] = None,
    open_browser: Annotated[bool, typer.Option("--open", help="Open it in the browser.")] = False,
) -> None:
    """Open the dashboard and print its address.

    Its pages answer which heads matter, where they look, from which tokens an answer comes, where attention drains, and
    what changes when attention is edited. A page's address holds its view. Stop it with Ctrl-C.
    """
    if sys.stderr.isatty():
        typer.echo("Starting the dashboard; this takes some seconds.", err=True)
    with extra("dashboard"):
        from headwater.dashboard.launch import run

        run(model, port, host, open_browser, prompt)
