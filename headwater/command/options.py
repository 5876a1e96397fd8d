"""Options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from headwater.command import completion

DEFAULT_MODEL = "tasks-4l"

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
Model = Annotated[
    str,
    typer.Option(
        "--model", "-m", help="Embedded name, local folder or hub id.", autocompletion=completion.models
    ),
]
Prompts = Annotated[list[str] | None, typer.Argument(help="Prompts in quotes; - reads standard input.")]
PromptFile = Annotated[Path | None, typer.Option("--file", "-f", help="Text file with one prompt per line.")]
Whole = Annotated[bool, typer.Option("--whole", help="Take the file or standard input as one prompt.")]
PrependBos = Annotated[
    bool | None,
    typer.Option(
        help="Put the token that begins a text in front, or leave it out; else as the tokenizer does."
    ),
]
Images = Annotated[
    list[Path] | None,
    typer.Option("--image", help="A picture; once for all prompts, or once for each.", metavar="FILE"),
]
Sounds = Annotated[
    list[Path] | None,
    typer.Option("--audio", help="A sound (WAV); once for all prompts, or once for each.", metavar="FILE"),
]
Decoders = Annotated[
    list[str] | None,
    typer.Option(
        "--decoder", help="What the decoder writes; once for all, or once for each.", metavar="TEXT"
    ),
]
Labels = Annotated[
    list[str] | None,
    typer.Option("--label", help="The right class, or the word at the mask, for losses.", metavar="NAME"),
]
Part = Annotated[
    str | None,
    typer.Option("--part", help="A part of the model, such as encoder, cross or vision; else its main part."),
]
Edits = Annotated[Path | None, typer.Option("--edits", help="Run under the edits in this JSON file.")]
