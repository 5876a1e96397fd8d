"""beartype on shapes alone: a wrong value of any other kind must reach Headwater's own refusal, which tests look at."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, get_args

import jaxtyping
from beartype import beartype


def shapes(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, held to those of its annotations that state a shape."""
    function.__annotations__ = {
        n: hint for n, hint in function.__annotations__.items() if _states_shape(hint)
    }
    return beartype(function)


def _states_shape(hint: Any) -> bool:
    if isinstance(hint, list):  # the arguments of a Callable
        return any(map(_states_shape, hint))
    if inspect.isclass(hint) and issubclass(hint, jaxtyping.AbstractArray):
        return True
    return any(map(_states_shape, get_args(hint)))
