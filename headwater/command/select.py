"""`--select role=induction`: one value of an axis of a result, for what is printed and drawn."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from headwater.dashboard.figures.select import choose
from headwater.lens.errors import AnalysisError


def select(result: Any, given: Iterable[str]) -> Any:
    """The result at `axis=value` of each text: a label of the axis, else a position counted from 0 or from the end."""
    for text in given:
        axis, equals, value = text.partition("=")
        if not equals:
            raise AnalysisError(f"--select {text!r} has no value; write {text}=VALUE")
        try:
            result = choose(result, {axis: value})
        except AnalysisError as error:
            raise AnalysisError(f"--select: {error}") from None
    return result
