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
Edits = Annotated[Path | None, typer.Option("--edits", help="Run under the edits in this JSON file.")]
