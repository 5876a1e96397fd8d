"""The `headwater` command: dashboard, models, record, analyze, experiment, verify, doctor.

Data goes to standard output (`--json` for programs), progress and errors to standard error. Bad input is one line and
exit code 2, Ctrl-C is 130. Nothing heavy is imported before a command needs it, so `--help` answers at once.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from headwater.lens.errors import HeadwaterError
from headwater.lens.files import check_target, write_text

if TYPE_CHECKING:
    from headwater.analyses._catalogue.catalogue import Entry
    from headwater.lens.model import HookedModel

DEFAULT_MODEL = "tasks-4l"


class OneLineErrors(TyperGroup):
    """Turns every error that Headwater raises on purpose into one line and exit code 2."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except HeadwaterError as error:
            typer.echo(f"headwater: {' '.join(str(error).split())}", err=True)
            raise typer.Exit(2) from None


app = typer.Typer(
    cls=OneLineErrors,
    help="Look into the attention of a transformer, and change it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
Model = Annotated[str, typer.Option("--model", "-m", help="Embedded name, local folder or hub id.")]
Prompts = Annotated[list[str] | None, typer.Argument(help="Prompts in quotes; - reads standard input.")]
PromptFile = Annotated[Path | None, typer.Option("--file", "-f", help="Text file with one prompt per line.")]
Whole = Annotated[bool, typer.Option("--whole", help="Take the file or standard input as one prompt.")]
PrependBos = Annotated[
    bool | None,
    typer.Option(
        help="Put the token that begins a text in front, or leave it out; else as the tokenizer does."
    ),
]
Edits = Annotated[Path | None, typer.Option("--edits", help="Run under the edits in this JSON file.")]


@app.command()
def dashboard(
    model: Annotated[str | None, typer.Argument(help="Model to open; an embedded one if left out.")] = None,
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="First port to try.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; only loopback is private.")] = "127.0.0.1",
    open_browser: Annotated[bool, typer.Option("--open", help="Open it in the browser.")] = False,
) -> None:
    """Open the dashboard and print its address."""
    if sys.stderr.isatty():
        typer.echo("Starting the dashboard; this takes some seconds.", err=True)
    with _extra("dashboard"):
        from headwater.dashboard.launch import run

        run(model, port, host, open_browser)


@app.command()
def models(as_json: AsJson = False) -> None:
    """List the models that ship with Headwater."""
    from headwater.command import output
    from headwater.lens.models.embedded import embedded

    found = embedded()
    typer.echo(output.as_json(found) if as_json else output.models(found))


@app.command()
def record(
    prompts: Prompts = None,
    model: Model = DEFAULT_MODEL,
    file: PromptFile = None,
    whole: Whole = False,
    statistic: Annotated[
        list[str] | None, typer.Option("--statistic", "-s", help="Repeat for several.")
    ] = None,
    layers: Annotated[str | None, typer.Option(help="Layers to record, such as 0-3 or 1,4.")] = None,
    keep: Annotated[str, typer.Option(help="What is kept: qk, qkv, or none (statistics alone).")] = "qk",
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Save the record to this file.")] = None,
    estimate: Annotated[bool, typer.Option("--estimate", help="Say the memory it takes and stop.")] = False,
    edits: Edits = None,
    prepend_bos: PrependBos = None,
    as_json: AsJson = False,
) -> None:
    """Run prompts through a model and show, or save, what its heads do."""
    from headwater.command import inputs, output

    if out is not None:
        check_target(out, HeadwaterError)
    texts = inputs.prompts(prompts or [], file, whole)
    asked: dict[str, Any] = {"keep": () if keep == "none" else (keep,)}
    asked |= {"statistics": tuple(statistic)} if statistic else {}
    asked |= {"layers": inputs.layers(layers)} if layers is not None else {}
    changes = inputs.edits(edits) if edits else []
    loaded = _load(model, prepend_bos)
    _note_unknown(loaded, texts)
    if estimate:
        cost = loaded.estimate(texts, **asked)
        typer.echo(output.as_json(cost) if as_json else str(cost))
        return
    with loaded.edit(*changes), _busy("Recording"):
        found = loaded.record(texts, **asked)
    if out is not None:
        found.save(out)
    typer.echo(output.as_json(found.to_xarray()) if as_json else output.summary(found))


@app.command()
def analyze(
    analysis: Annotated[str | None, typer.Argument(help="Its name; without one, the list of them.")] = None,
    prompts: Prompts = None,
    model: Model = DEFAULT_MODEL,
    file: PromptFile = None,
    whole: Whole = False,
    given: Annotated[
        list[str] | None, typer.Option("--set", help="A setting, name=value; repeatable.")
    ] = None,
    about: Annotated[
        bool, typer.Option("--about", help="Say what it computes and its settings; stop.")
    ] = False,
    saved: Annotated[Path | None, typer.Option("--record", help="Use this record, not prompts.")] = None,
    circuit: Annotated[
        Path | None, typer.Option("--circuit", help="Judge the circuit in this file (GraphML or JSON).")
    ] = None,
    html: Annotated[Path | None, typer.Option("--html", help="Draw the result into this file.")] = None,
    chosen: Annotated[
        list[str] | None, typer.Option("--select", help="One value of an axis, axis=value; repeatable.")
    ] = None,
    edits: Edits = None,
    prepend_bos: PrependBos = None,
    as_json: AsJson = False,
) -> None:
    """Ask one question of the catalogue about a model and prompts, or about circuit files."""
    from headwater.analyses._catalogue.catalogue import catalogue, entry
    from headwater.command import inputs, output
    from headwater.command.select import select

    if analysis is None:
        typer.echo(output.as_json(list(catalogue().values())) if as_json else output.catalogue(catalogue()))
        return
    asked = entry(analysis)
    if about:
        typer.echo(output.as_json(asked) if as_json else output.entry(asked))
        return
    if html is not None:
        check_target(html, HeadwaterError)
    settings = inputs.settings(asked, given or [])
    inputs.fits(asked, prompts or [], file, edits, saved, circuit, prepend_bos)
    if saved is not None:
        result = _of_record(asked, saved, settings)
    elif asked.inputs == "circuits":
        with _busy(asked.name):
            result = asked.function(*inputs.circuits(prompts or []), **settings)
    else:
        texts = inputs.prompts(prompts or [], file, whole) if asked.inputs != "model" else []
        changes = inputs.edits(edits) if edits else []
        loaded = _load(model, prepend_bos)
        _note_unknown(loaded, texts)
        with loaded.edit(*changes), _busy(asked.name):
            result = _of_model(asked, loaded, texts, settings, circuit)
    try:
        result = select(result, chosen or [])
    finally:  # whatever is wrong with --select or --html, what was computed is printed
        typer.echo(output.as_json(result) if as_json else output.as_text(result))
    if html is not None:
        with _extra("dashboard"):
            page = output.as_page(result)
        write_text(html, page, HeadwaterError)


@app.command()
def experiment(
    file: Annotated[Path, typer.Argument(help="Experiment file (JSON), as the dashboard saves it.")],
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Take this model; its weights must be those named.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Run an experiment file and write results beside it, or verify those that are there."""
    from headwater.command import output
    from headwater.lens.experiments.run_file import run_file

    loaded = None if model is None else _load(model)
    with _counted("Running") as tell:
        found = run_file(file, loaded, tell)
    typer.echo(found.results.to_json() if as_json else output.outcome(found), nl=not as_json)
    if found.verified is False:
        raise typer.Exit(1)


@app.command()
def verify(
    files: Annotated[list[Path], typer.Argument(help="Records, results, experiments, circuits.")],
) -> None:
    """Say what saved files hold, and whether they are as they were written."""
    from headwater.command.verify import verify

    wrong = False
    for file in files:
        try:
            typer.echo(f"{file}: {verify(file)}")
        except HeadwaterError as error:
            typer.echo(f"headwater: {' '.join(str(error).split())}", err=True)
            wrong = True
    if wrong:
        raise typer.Exit(2)


@app.command()
def doctor(
    models: Annotated[
        bool, typer.Option("--models", help="Measure every architecture against transformers' own attention.")
    ] = False,
    matrix: Annotated[
        bool, typer.Option("--matrix", help="Run every analysis on a small model of every architecture.")
    ] = False,
    write: Annotated[
        Path | None, typer.Option(help="With --models or --matrix: the page to put the table into.")
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(help="With --matrix: file of finished cells to go on from.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say what this machine offers: builds, devices, backends, memory, versions, network."""
    from headwater.command import output
    from headwater.command.doctor import examine

    if write is not None:
        check_target(write, HeadwaterError)
    if matrix:
        _matrix(write, resume, as_json)
        return
    if models or write is not None:
        _architectures(write, as_json)
        return
    with _busy("Trying the backends"):
        found = examine()
    typer.echo(output.as_json(found) if as_json else output.health(found))
    if not found["ok"]:
        raise typer.Exit(1)


def _architectures(write: Path | None, as_json: bool) -> None:
    from headwater.command import architectures, output, tables
    from headwater.lens.loading.coverage import measure_all

    with _busy("Measuring the architectures"):
        rows = list(measure_all())
    if write is not None:
        architectures.write(write, rows)
    lines = tables.columns([list(architectures.HEADINGS), *map(architectures.cells, rows)])
    typer.echo(output.as_json(rows) if as_json else "\n".join(lines))
    for row in rows:
        for fault in row.faults:
            typer.echo(f"headwater: {row.title}: {fault}", err=True)
    if any(row.faults for row in rows):
        raise typer.Exit(1)


def _matrix(write: Path | None, resume: Path | None, as_json: bool) -> None:
    from headwater.command import matrix, matrix_page, output

    with _counted("Running every analysis on every architecture") as tell:
        cells = matrix.measure(path=resume, tell=tell)
    if write is not None:
        matrix_page.write(write, cells)
    typer.echo(output.as_json(cells) if as_json else "\n".join(matrix_page.lines(cells)))
    failed = [cell for cell in cells if cell.state in ("wrong", "error")]
    for cell in failed:
        typer.echo(f"headwater: {cell.analysis} on {matrix_page.title(cell.row)}: {cell.line}", err=True)
    if failed:
        raise typer.Exit(1)


def _of_record(asked: Entry, saved: Path, settings: dict[str, Any]) -> Any:
    from headwater.lens.records.record import Record

    with _busy(asked.name):
        return asked.function(Record.open(saved), **settings)


def _of_model(
    asked: Entry, loaded: HookedModel, texts: list[str], settings: dict[str, Any], circuit: Path | None
) -> Any:
    from headwater.command import inputs

    if asked.inputs == "record":
        kept = ("mixers",) if settings.get("mixers") == "effective" else ()
        return asked.function(loaded.record(texts, keep=(*asked.keep, *kept)), **settings)
    if asked.inputs == "model+pairs":
        return asked.function(loaded, *inputs.of_pairs(asked.function, texts, circuit), **settings)
    return asked.function(loaded, *([texts] if asked.inputs == "model+examples" else []), **settings)


def _note_unknown(loaded: HookedModel, texts: list[str]) -> None:
    """A word outside of the vocabulary is read as the unknown token without a word; say so once."""
    if unknown := loaded.unknown_words(texts):
        shown = ", ".join(map(repr, unknown[:8])) + (
            f" and {len(unknown) - 8} more" if len(unknown) > 8 else ""
        )
        typer.echo(
            f"headwater: {loaded.name} does not know {shown} and reads the unknown token there", err=True
        )


def _load(model: str, prepend_bos: bool | None = None) -> HookedModel:
    import headwater

    with _busy(f"Loading {model}"):
        return headwater.load(model, prepend_bos=prepend_bos)


@contextmanager
def _busy(work: str) -> Iterator[None]:
    """A moving sign with the seconds gone by on standard error, while it is a terminal."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    signs = SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn()
    with Progress(*signs, console=Console(stderr=True), transient=True) as progress:
        progress.add_task(work, total=None)
        yield


@contextmanager
def _counted(work: str) -> Iterator[Any]:
    """A bar that fills as `tell(done, of)` says, on standard error, while it is a terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task(work, total=None)
        yield lambda done, of: progress.update(bar, completed=done, total=of)


@contextmanager
def _extra(name: str) -> Iterator[None]:
    """Say which extra to install where an optional library is missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("headwater"):
            raise
        raise HeadwaterError(
            f"this needs {error.name}, which is missing; pip install 'headwater[{name}]'"
        ) from None


def main() -> None:
    """Entry of the console script; output never fails on a character the terminal lacks."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    app()
