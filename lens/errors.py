"""The errors that bad input raises. A message is one line: what is wrong, the value that came, what to do."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable
from typing import Any

LONGEST = 2000  # characters of a message


class HeadwaterError(Exception):
    """Base class of all errors caused by user input; the command line prints the message and exits with 2.

    The message is one line of at most 2,000 characters. A longer one, which repeats what came, loses its middle.

    >>> import headwater as hw
    >>> try:
    ...     hw.load("tasks-4l").record("Mary").map(9)
    ... except hw.HeadwaterError as error:
    ...     print(error)
    layer 9 is not in the record; it has layers 0, 1, 2, 3
    """

    def __init__(self, message: str = "") -> None:
        line = " ".join(message.splitlines())
        super().__init__(line if len(line) <= LONGEST else f"{line[: LONGEST - 603]} … {line[-600:]}")


class ModelError(HeadwaterError):
    """A model that can not be found, read, trusted or hooked, or that lacks what was asked of it."""


class PromptError(HeadwaterError):
    """A prompt that is empty or too long, or holds token ids outside of the vocabulary."""


class HeadError(HeadwaterError):
    """A layer or head that does not exist, or a name that is no head."""


class EditError(HeadwaterError):
    """An edit with invalid values, or one that does not fit the model or the prompt."""


class RecordError(HeadwaterError):
    """A record that lacks what was asked of it, or a file that is not a record."""


class ResourceError(HeadwaterError):
    """A run that would need more memory or disk than there is; predicted before it starts."""


class ExperimentError(HeadwaterError):
    """An experiment file that can not be read or run, or results that belong to another experiment."""


class SweepError(HeadwaterError):
    """A sweep file or a run folder that can not be read, written or taken up again."""


class AnalysisError(HeadwaterError):
    """An analysis called with settings or inputs that it does not accept."""


def first_line(error: BaseException) -> str:
    """The first line of what another library's error says; the name of its class where it says nothing."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def named_line(error: BaseException) -> str:
    """The class of another library's error and the first line of what it says, if anything."""
    name, line = type(error).__name__, first_line(error)
    return name if line == name else f"{name}: {line}"


def as_short(value: Any) -> str:
    """Plain data as JSON of at most 40 letters."""
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."


def nearest(name: object, known: Iterable[str]) -> str:
    """The end of an error message: "did you mean 'a' or 'b'?", or the list of all names where none is close."""
    known = list(known)
    close = difflib.get_close_matches(str(name), known, n=3, cutoff=0.5)
    if close:
        return "did you mean " + " or ".join(repr(c) for c in close) + "?"
    return "there are " + ", ".join(known) if known else "there are none"
