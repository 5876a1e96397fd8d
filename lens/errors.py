"""Errors that bad input gets: one line that names the thing, the value that came and the mend."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class HeadwaterError(Exception):
    """Base of every error that is the user's to mend; the command line prints it and exits with 2.

    >>> import headwater as hw
    >>> try:
    ...     hw.load("tasks-4l").record("Mary").map(9)
    ... except hw.HeadwaterError as error:
    ...     print(error)
    layer 9 is not in the record; it has layers 0, 1, 2, 3
    """


class ModelError(HeadwaterError):
    """A model that can not be found, read, trusted or hooked, or is asked for what it does not have."""


class PromptError(HeadwaterError):
    """A prompt that is empty, too long, or holds tokens that the model does not know."""


class HeadError(HeadwaterError):
    """A layer or a head that does not exist, or is written wrongly."""


class EditError(HeadwaterError):
    """An edit whose values make no sense, or that the model or the prompt can not take."""


class RecordError(HeadwaterError):
    """A record that lacks what is asked of it, or a file that is not a record."""


class ResourceError(HeadwaterError):
    """More memory than there is, predicted before running."""


class ExperimentError(HeadwaterError):
    """An experiment file that can not be read or run, or results that are not its own."""


class AnalysisError(HeadwaterError):
    """An analysis asked for with settings or inputs it can not take."""


def nearest(name: str, known: Iterable[str]) -> str:
    """`: did you mean 'a' or 'b'?`, or the list of all where nothing is near."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if close:
        return "did you mean " + " or ".join(repr(c) for c in close) + "?"
    return "there are " + ", ".join(known) if known else "there are none"
