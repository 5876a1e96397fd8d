"""The `headwater` command: dashboard, models, record, analyze, experiment, corpus, sweep, verify, doctor.

Data goes to standard output (`--json` for programs), progress and errors to standard error. Bad input is one line and
exit code 2, Ctrl-C is 130. Nothing heavy is imported before a command needs it, so `--help` answers at once.
"""

from __future__ import annotations

import _thread
import errno
import sys
from io import TextIOWrapper
from threading import Timer
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from headwater.command import analyze, corpus, dashboard, doctor, experiment, models, record, sweep, verify
from headwater.lens.errors import HeadwaterError


class OneLineErrors(TyperGroup):
    """Turns every error that Headwater raises on purpose, and those of the system, into one line and exit code 2."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except HeadwaterError as error:
            typer.echo(f"headwater: {error}", err=True)
            raise typer.Exit(2) from None
        except OSError as error:
            if error.errno == errno.EPIPE:  # a reader that leaves early, which typer looks after
                raise
            typer.echo(f"headwater: {' '.join(str(error).split())}", err=True)
            raise typer.Exit(2) from None


app = typer.Typer(
    cls=OneLineErrors,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def tell_version(asked: bool) -> None:
    if asked:
        from headwater import __version__

        typer.echo(f"headwater {__version__}")
        raise typer.Exit


@app.callback()
def headwater(
    version: Annotated[
        bool,
        typer.Option("--version", callback=tell_version, is_eager=True, help="Say the version and stop."),
    ] = False,
) -> None:
    """Look into the attention of a transformer, and change it."""


for command in (
    dashboard.dashboard,
    record.record,
    analyze.analyze,
    experiment.experiment,
    corpus.corpus,
    verify.verify,
    doctor.doctor,
):
    app.command()(command)
app.add_typer(models.app, name="models")
app.add_typer(sweep.app, name="sweep")


def _heard_again(lost: Any) -> None:
    """Ctrl-C within compiled code that calls Python, such as pydantic's, is dropped there; it is sent once more."""
    if isinstance(lost.exc_value, KeyboardInterrupt):
        Timer(0.01, _thread.interrupt_main).start()  # not at once: raised in here it would be dropped again
    else:
        sys.__unraisablehook__(lost)


def main() -> None:
    """Entry of the console script; output never fails on a character the terminal lacks."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    sys.unraisablehook = _heard_again
    try:
        app()
    except KeyboardInterrupt:  # while the commands are put together, which typer does not look after
        sys.exit(130)
