"""`headwater corpus`: what every head does over the texts of a file or folder; shards are merged, results shown."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from headwater.analyses._corpora.shards import Shard
from headwater.command.options import DEFAULT_MODEL, AsJson, Model, Part, PrependBos
from headwater.lens.errors import HeadwaterError

MERGE = "merge"
RESULT = ".safetensors"


def corpus(
    texts: Annotated[
        list[str],
        typer.Argument(
            help="A file of texts (.jsonl, .txt, .parquet) or a folder of them; or a result, to show it; or 'merge' "
            "and results of shards.",
            metavar="TEXTS | RESULT | merge RESULT…",
        ),
    ],
    model: Model = DEFAULT_MODEL,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", help="Write the result to this .safetensors file; a run goes on from it."
        ),
    ] = None,
    length: Annotated[int | None, typer.Option(help="Tokens of a text; longer ones are cut.")] = None,
    keep: Annotated[int, typer.Option(help="Examples of each statistic and head.")] = 5,
    shard: Annotated[str, typer.Option(help="Take every n-th text from the i-th on: i/n.")] = "1/1",
    most: Annotated[int | None, typer.Option("--texts", help="Take the first texts only.")] = None,
    field: Annotated[str, typer.Option(help="Key or column with the text.")] = "text",
    unit: Annotated[
        Literal["file", "paragraph"], typer.Option(help="What a text of a .txt file is.")
    ] = "file",
    anew: Annotated[bool, typer.Option("--anew", help="Replace the result that is there.")] = False,
    small: Annotated[
        bool, typer.Option("--small", help="Write what is shown alone; it can not be merged.")
    ] = False,
    headvis: Annotated[
        Path | None,
        typer.Option(
            help="Write a result, with --model, into this new folder in the public form of HeadVis."
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(help="Tokens of each head in a small result.", min=1)] = 20,
    examples: Annotated[int, typer.Option(help="Examples of each head in a small result.", min=1)] = 3,
    by: Annotated[str, typer.Option(help="Statistic by which heads are listed.")] = "weight",
    heads: Annotated[int, typer.Option(help="Heads to list.", min=1)] = 10,
    part: Part = None,
    prepend_bos: PrependBos = None,
    as_json: AsJson = False,
) -> None:
    """Collect what every head does over many texts, in memory linear in a text."""
    from headwater.analyses._corpora.collect import corpus as collect
    from headwater.analyses._corpora.result import Corpus
    from headwater.analyses._corpora.statistics import known

    known(by)
    if headvis is not None and not texts[0].endswith(RESULT):
        raise HeadwaterError(
            "--headvis is for finished results: headwater corpus RESULT --headvis FOLDER --model …"
        )
    if texts[0] == MERGE:
        if len(texts) < 2:
            raise HeadwaterError("there is nothing to merge; give the results of shards")
        found = Corpus.merge(Corpus.open(path, verify=True) for path in texts[1:])
    elif len(texts) > 1:
        raise HeadwaterError("give one file or folder of texts; or 'merge' and the results of shards")
    elif texts[0].endswith(RESULT):
        found = Corpus.open(texts[0], verify=True)
    else:
        from headwater.command import inputs

        if small:
            raise HeadwaterError(
                "--small is for finished results: headwater corpus RESULT --small --out FILE"
            )
        loaded = inputs.model(model, prepend_bos, part)
        found = collect(
            loaded, texts[0], out=out, length=length, keep=keep, shard=Shard.parse(shard, HeadwaterError),
            texts_at_most=most, field=field, unit=unit, anew=anew, on_save=None if sys.stderr.isatty() else _teller(),
        )  # fmt: skip
        _show(found, by, heads, as_json)
        return
    if headvis is not None:
        from headwater.analyses._corpora.headvis import export_headvis
        from headwater.command import inputs

        export_headvis(found, inputs.model(model, prepend_bos, part), headvis)
    found = found.small(tokens, examples) if small else found
    if out is not None:
        found.save(out)
    _show(found, by, heads, as_json)


def _teller() -> Callable[[int, int], None]:
    """Says on standard error how far it is and how long it will take, where no bar is drawn.

    The speed is that of this run: texts that an earlier one has read take no time.
    """
    begun: list[tuple[float, int]] = []

    def tell(done: int, total: int) -> None:
        if not begun:
            begun.append((time.monotonic(), done))
        start, first = begun[0]
        left = ""
        if first < done < total:
            minutes = (total - done) * (time.monotonic() - start) / (done - first) / 60
            left = f", about {minutes:.0f} min left"
        typer.echo(f"{done} of {total} texts{left}", err=True)

    return tell


def _show(found: Any, by: str, heads: int, as_json: bool) -> None:
    from headwater.analyses._corpora.result import NOT_FOR
    from headwater.command import output

    listed = found.find(by, heads)
    if as_json:
        rows = [{"layer": layer, "head": head, by: value} for (layer, head), value in listed[by].items()]
        content = {"model": found.run["model"], **found.state.told, "finished": found.complete, "heads": rows}
        typer.echo(output.as_json({**content, "not_for": NOT_FOR}))
        return
    told = found.state.told
    typer.echo(repr(found))
    typer.echo(
        f"cut: {told['cut']}; left out: {told['empty']} empty, {told['short']} of one token; "
        + ("every text is in it" if found.complete else "not finished, or a shard of several")
    )
    typer.echo(f"\nheads by {by} (mean over rows):")
    for (layer, head), value in listed[by].items():
        best = found.examples(layer, head, by)
        typer.echo(f"  {layer}.{head}  {value:8.4f}  {_example(best[0]) if best else ''}".rstrip())
    typer.echo(f"\nnot for: {NOT_FOR}")


def _example(one: Any) -> str:
    """The strongest place of a head, with its two words."""
    if not one.tokens:
        return ""
    query, key = (one.tokens[at] for at in (one.query, one.key))
    return f"{one.value:.3f} from {query!r} to {key!r} ({one.where})"
