"""What an analysis says of itself: its question, unit, source, cost and limits, and what it reads.

The labelled paragraphs of its docstring say it. `listed` reads them in the files, without importing any analysis: a
list of questions needs no torch.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from headwater.lens.errors import AnalysisError, nearest

Inputs = Literal["record", "model", "model+examples", "model+pairs", "circuits"]
Maps = Literal[
    "any", "square"
]  # square: queries and keys are the same tokens, as they are not in cross-attention
LABELS = {"question": "Question", "unit": "Unit", "paper": "Source", "cost": "Cost", "not_for": "Not for"}
LABELLED = re.compile(
    rf"^({'|'.join(LABELS.values())}): (.+?)(?=\n\n|\n(?:{'|'.join(LABELS.values())}): |\Z)", re.S | re.M
)
FOLDER = Path(__file__).parents[1]
ROOMS = (
    "tokens",
    "explanations",
    "heads",
    "caches",
    "sinks",
    "logits",
    "vision",
    "circuits",
)  # in the order in which they are listed


@dataclass(frozen=True)
class About:
    """Question, unit, source, cost and limits of one analysis.

    `keep` is the content that a record needs for it, and `maps` says which maps it can read.
    """

    question: str
    unit: str
    paper: str
    cost: str
    not_for: str
    inputs: Inputs
    keep: tuple[str, ...] = ("qk",)
    maps: Maps = "any"


@dataclass(frozen=True, kw_only=True)
class Listed(About):
    """One analysis of the folder: its labels, its name, and the room in which its file lies."""

    name: str
    room: str


def labelled(text: str, name: str) -> dict[str, str]:
    """The labelled paragraphs of a docstring, as fields of `About`. ValueError where one is missing."""
    found = {label: " ".join(words.split()) for label, words in LABELLED.findall(text)}
    missing = [label for label in LABELS.values() if label not in found]
    if missing:
        raise ValueError(f"the docstring of {name} says nothing under {', '.join(missing)}")
    return {field: found[label].rstrip(".") for field, label in LABELS.items()}


def unlabelled(text: str) -> str:
    """A docstring without its labelled paragraphs and without its examples."""
    text = LABELLED.sub("", text.partition("\n>>> ")[0])
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def inputs_of(parameters: Mapping[str, bool]) -> Inputs:
    """What an analysis reads, found from the names of its parameters; True where one has a default value."""
    first, *others = parameters
    if first == "record":
        return "record"
    if first != "model":
        return "circuits"
    if {"pairs", "clean"} & parameters.keys():
        return "model+pairs"
    return "model+examples" if others and not parameters[others[0]] else "model"


def files() -> dict[str, Path]:
    """The file of each analysis by its name, in alphabetical order."""
    found = FOLDER.glob("[!_]*/[!_]*.py")
    return {file.stem: file for file in sorted(found, key=lambda file: file.stem)}


def file_of(name: str) -> Path:
    """The file of the analysis called `name`. AnalysisError offers the nearest names."""
    known = files()
    if name not in known:
        raise AnalysisError(f"no analysis is called {name!r}; {nearest(name, known)}")
    return known[name]


def room_questions() -> dict[str, str]:
    """The question that the analyses of each room answer, from the docstring of the room."""
    texts = {room: (FOLDER / room / "__init__.py").read_text(encoding="utf-8") for room in ROOMS}
    told = {
        room: dict(LABELLED.findall(ast.get_docstring(ast.parse(text)) or "")) for room, text in texts.items()
    }
    return {room: labels[LABELS["question"]] for room, labels in told.items()}


@cache
def listed() -> dict[str, Listed]:
    """Every analysis by name, in alphabetical order, read from the text of its file."""
    return {name: _read(name, file) for name, file in files().items()}


def _read(name: str, file: Path) -> Listed:
    body = ast.parse(file.read_text(encoding="utf-8")).body
    function = next(node for node in body if isinstance(node, ast.FunctionDef) and node.name == name)
    given = {
        str(keyword.arg): ast.literal_eval(keyword.value)
        for each in function.decorator_list
        if isinstance(each, ast.Call)
        for keyword in each.keywords
    }
    told: dict[str, Any] = labelled(ast.get_docstring(function) or "", name)
    inputs = inputs_of(dict(_parameters(function.args)))
    return Listed(**told, **given, inputs=inputs, name=name, room=file.parent.name)


def _parameters(arguments: ast.arguments) -> Iterator[tuple[str, bool]]:
    """Each parameter and whether it has a default value."""
    places = [*arguments.posonlyargs, *arguments.args]
    first = len(places) - len(arguments.defaults)
    yield from ((each.arg, place >= first) for place, each in enumerate(places))
    for each, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        yield each.arg, default is not None
