"""What a command line is given, read and checked: models, prompts, layers, settings, edits.

Each function gives back values or raises a one-line error that names the thing, what came, and the mend.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from headwater.command.beside import Beside
from headwater.command.waiting import busy
from headwater.lens.errors import AnalysisError, EditError, PromptError, RecordError, nearest
from headwater.lens.files import as_text, bounded, parse_json, read_text

if TYPE_CHECKING:
    from headwater.analyses._catalogue.catalogue import Entry
    from headwater.lens.model import HookedModel

MOST_PROMPT_BYTES = 64 * 2**20
MOST_EDIT_BYTES = 2**20


def model(name: str, prepend_bos: bool | None = None, part: str | None = None) -> HookedModel:
    """The model called `name`, or a part of it, loaded while a terminal sees a moving sign."""
    import headwater

    with busy(f"Loading {name}"):
        loaded = headwater.load(name, prepend_bos=prepend_bos)
    return loaded if part is None else loaded.part(part)


def frames_of(loaded: HookedModel) -> int:
    """How many pictures are one film for a model of films; 1 for any other."""
    films = any(part.patches is not None and part.patches.depth for part in loaded.parts.values())
    return int(getattr(loaded.hf.config, "num_frames", 1)) if films else 1


def note_unknown(loaded: HookedModel, texts: list[str]) -> None:
    """A word outside of the vocabulary is read as the unknown token without a word; say so once."""
    if unknown := loaded.unknown_words(texts):
        shown = ", ".join(map(repr, unknown[:8])) + (
            f" and {len(unknown) - 8} more" if len(unknown) > 8 else ""
        )
        typer.echo(
            f"headwater: {loaded.name} does not know {shown} and reads the unknown token there", err=True
        )


def prompts(words: Sequence[str], file: Path | None, whole: bool, may_lack: bool = False) -> list[str]:
    """The prompts asked for: one per argument, or one per line of a file or of standard input (`-`, or a pipe).

    Where prompts `may_lack`, none is no fault, and standard input is read for `-` alone.
    """
    if file is not None and words:
        raise PromptError(f"prompts were given twice, as arguments and in {file}; give one of them")
    if file is not None:
        return _split(read_text(file, MOST_PROMPT_BYTES, PromptError), str(file), whole)
    if may_lack and not words:
        return []
    if list(words) == ["-"] or (not words and not sys.stdin.isatty()):
        name = "standard input"
        content = bounded(sys.stdin.buffer, name, MOST_PROMPT_BYTES, PromptError)
        return _split(as_text(content, name, PromptError), name, whole)
    if not words:
        raise PromptError(
            "no prompt was given; give one in quotes, a file with --file, a picture with --image, or pipe text in"
        )
    return list(words)


def pairs(texts: Sequence[Any]) -> list[tuple[Any, Any]]:
    """The pairs of an analysis of pairs from prompts that take turns: clean, corrupt, clean, corrupt …"""
    if len(texts) % 2:
        raise PromptError(
            f"{len(texts)} is an odd number of prompts; give pairs: clean 1, corrupt 1, clean 2, corrupt 2 … (both "
            "prompts of a pair need the same number of tokens)"
        )
    return list(zip(texts[::2], texts[1::2], strict=True))


def circuits(words: Sequence[str]) -> list[str]:
    """The two circuit files that an analysis of circuits compares."""
    if len(words) != 2:
        raise AnalysisError(
            f"{len(words)} circuit file{'s' * (len(words) != 1)} given; give two, as in A.json B.json"
        )
    return list(words)


def fits(
    asked: Entry, words: Sequence[str], file: Path | None, beside: Beside, edits: Path | None, saved: Path | None,
    circuit: Path | None, prepend_bos: bool | None = None, part: str | None = None,
) -> None:  # fmt: skip
    """Refuse what an analysis does not read."""
    if saved is not None and (asked.inputs != "record" or words or file or beside or edits):
        rule = "--record takes the place of prompts, pictures, sounds and edits, where a record is read"
        raise AnalysisError(f"{rule}; {asked.name} reads {asked.inputs}")
    if prepend_bos is not None and (saved is not None or asked.inputs == "circuits"):
        raise AnalysisError("--prepend-bos is for prompts that are read now; leave it out")
    from headwater.analyses._catalogue.calling import second_parameter

    if circuit is not None and second_parameter(asked.function) != "graph":
        raise AnalysisError(
            f"--circuit is for analyses that judge a circuit; {asked.name} reads {asked.inputs}"
        )
    if asked.inputs == "model" and (words or file or beside):
        raise AnalysisError(f"{asked.name} reads the model alone; leave the prompts out")
    if asked.inputs == "circuits" and (file or beside or edits or part):
        raise AnalysisError(
            f"{asked.name} reads two circuit files, no model and no prompts; leave --file, --edits, "
            "--part, pictures and sounds out"
        )


def layers(text: str) -> list[int]:
    """`0-3`, `1,4` or both as a list of layers."""
    found: list[int] = []
    try:
        for part in text.split(","):
            first, dash, last = part.strip().partition("-")
            span = range(int(first), int(last) + 1) if dash else [int(first)]
            if not span:
                raise RecordError(f"layers {text!r} go backwards; write them as {last}-{first}")
            found += span
    except ValueError:
        raise RecordError(f"layers {text!r} can not be read; write them as 0-3 or 1,4") from None
    return found


def settings(asked: Entry, given: Iterable[str]) -> dict[str, Any]:
    """`name=value` texts as the typed settings of an analysis."""
    values: dict[str, Any] = {}
    known = [setting.name for setting in asked.settings]
    for text in given:
        name, equals, value = text.partition("=")
        if not equals:
            raise AnalysisError(f"setting {text!r} has no value; write {text}=VALUE")
        if name not in known:
            raise AnalysisError(f"{asked.name} has no setting {name!r}; {nearest(name, known)}")
        if name in values:
            raise AnalysisError(f"setting {name!r} is given twice; give it once")
        values[name] = asked.setting(name).parse(value)
    for each in asked.settings:
        if each.required and each.name not in values:
            raise AnalysisError(f"{asked.name} needs --set {each.name}=…, {each.help}")
    return values


def edits(file: Path) -> list[Any]:
    """Edits from JSON: a list of them, or an object that holds one as `edits`, as the dashboard saves it."""
    from headwater import edit_from_dict

    content = parse_json(read_text(file, MOST_EDIT_BYTES, EditError), str(file), EditError)
    listed = content.get("edits") if isinstance(content, dict) else content
    if not isinstance(listed, list) or not all(isinstance(edit, dict) for edit in listed):
        raise EditError(f'{file} holds no list of edits; write [{{...}}] or {{"edits": [{{...}}]}}')
    return [edit_from_dict(edit) for edit in listed]


def _split(text: str, name: str, whole: bool) -> list[str]:
    if not text.strip():
        raise PromptError(f"{name} holds no prompt; put one on each line")
    return [text] if whole else [line for line in text.splitlines() if line.strip()]
