"""`headwater record`: prompts through a model, and what its heads do."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

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
from headwater.lens.errors import HeadwaterError
from headwater.lens.files import check_target


def record(
    prompts: Prompts = None,
    model: Model = DEFAULT_MODEL,
    file: PromptFile = None,
    whole: Whole = False,
    images: Images = None,
    sounds: Sounds = None,
    decoders: Decoders = None,
    labels: Labels = None,
    part: Part = None,
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
    beside = Beside.of(images, sounds, decoders, labels)
    texts = inputs.prompts(prompts or [], file, whole, beside.stand_alone)
    asked: dict[str, Any] = {"keep": () if keep == "none" else (keep,)}
    asked |= {"statistics": tuple(statistic)} if statistic else {}
    asked |= {"layers": inputs.layers(layers)} if layers is not None else {}
    changes = inputs.edits(edits) if edits else []
    loaded = inputs.model(model, prepend_bos, part)
    given = examples(texts, beside, inputs.frames_of(loaded))
    inputs.note_unknown(loaded, texts)
    if estimate:
        cost = loaded.estimate(given, **asked)
        typer.echo(output.as_json(cost) if as_json else str(cost))
        return
    with loaded.edit(*changes), busy("Recording"):
        found = loaded.record(given, **asked)
    if out is not None:
        found.save(out)
    typer.echo(output.as_json(found.to_xarray()) if as_json else output.summary(found))
