"""`headwater analyze`: one question of the catalogue about a model and prompts, or the list of questions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headwater.analyses._catalogue.about import file_of
from headwater.command import completion
from headwater.command.beside import Beside, examples
from headwater.command.options import (
    DEFAULT_MODEL,
    AsJson,
    Decoders,
    Edits,
    Images,
    Labels,
    Model,
    Part,
    PrependBos,
    PromptFile,
    Prompts,
    Sounds,
    Whole,
)
from headwater.command.waiting import busy
from headwater.lens.errors import AnalysisError, HeadwaterError
from headwater.lens.files import check_target, write_text

if TYPE_CHECKING:
    from headwater.analyses._catalogue.catalogue import Entry
    from headwater.lens.model import HookedModel


def analyze(
    analysis: Annotated[
        str | None,
        typer.Argument(help="Its name; without one, the list of them.", autocompletion=completion.analyses),
    ] = None,
    prompts: Prompts = None,
    model: Model = DEFAULT_MODEL,
    file: PromptFile = None,
    whole: Whole = False,
    images: Images = None,
    sounds: Sounds = None,
    decoders: Decoders = None,
    labels: Labels = None,
    part: Part = None,
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
    if analysis is None:
        from headwater.command import listing

        typer.echo(listing.as_json() if as_json else listing.as_text())
        return
    file_of(analysis)  # a wrong name is said before torch is imported
    from headwater.analyses._catalogue.catalogue import entry
    from headwater.command import inputs, output
    from headwater.command.select import select

    asked = entry(analysis)
    if about:
        typer.echo(output.as_json(asked) if as_json else output.entry(asked))
        return
    if html is not None:
        check_target(html, HeadwaterError)
    settings = inputs.settings(asked, given or [])
    beside = Beside.of(images, sounds, decoders, labels)
    inputs.fits(asked, prompts or [], file, beside, edits, saved, circuit, prepend_bos, part)
    if saved is not None:
        result = _of_record(asked, saved, settings, part)
    elif asked.inputs == "circuits":
        with busy(asked.name):
            result = asked.function(*inputs.circuits(prompts or []), **settings)
    else:
        reads = asked.inputs != "model"
        texts = inputs.prompts(prompts or [], file, whole, beside.stand_alone) if reads else []
        changes = inputs.edits(edits) if edits else []
        loaded = inputs.model(model, prepend_bos, part)
        prompted = examples(texts, beside, inputs.frames_of(loaded))
        inputs.note_unknown(loaded, texts)
        with loaded.edit(*changes), busy(asked.name):
            result = _of_model(asked, loaded, prompted, settings, circuit)
    try:
        result = select(result, chosen or [])
    finally:  # whatever is wrong with --select or --html, what was computed is printed
        typer.echo(output.as_json(result) if as_json else output.as_text(result))
    if html is not None:
        from headwater.command.page import as_page

        page, undrawn = as_page(result)
        write_text(html, page, HeadwaterError)
        if undrawn:
            raise AnalysisError(f"not drawn: {undrawn}")


def _of_record(asked: Entry, saved: Path, settings: dict[str, Any], part: str | None) -> Any:
    from headwater.lens.records.record import Record

    with busy(asked.name):
        opened = Record.open(saved)
        return asked.function(opened if part is None else opened.part(part), **settings)


def _of_model(
    asked: Entry, loaded: HookedModel, given: Sequence[Any], settings: dict[str, Any], circuit: Path | None
) -> Any:
    from headwater.analyses._catalogue.calling import ask
    from headwater.command import inputs

    read = inputs.pairs(given) if asked.inputs == "model+pairs" else given
    return ask(asked, loaded, read, settings, circuit=None if circuit is None else str(circuit))
