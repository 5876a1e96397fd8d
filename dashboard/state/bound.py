"""Widgets whose values are the state's: what a person changes is in the state before the page is drawn.

`name` is a field of the state ("layer") or a setting of a page ("heads.score"). The value is in the address and
survives leaving the page. A value that does not fit, from an address or of the last model, gives way to the default.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import streamlit as st

from headwater.dashboard.state.session import current, touch
from headwater.dashboard.state.state import State

Show = Callable[[Any], str]
LARGEST = 2**53 - 1  # that a number field of a browser holds exactly


def _key(name: str) -> str:
    return "bound-" + name.replace(".", "-")


def _take(name: str, read: Callable[[Any], Any] | None, then: Callable[[State], None] | None) -> None:
    value = st.session_state[_key(name)]
    state = current()
    state.put(name, value if read is None else read(value))
    touch()
    if then is not None:
        then(state)


def _bound(
    name: str, value: Any, read: Callable[[Any], Any] | None = None, then: Any = None
) -> dict[str, Any]:
    """The arguments that tie a widget to the state."""
    st.session_state[_key(name)] = value
    return {"key": _key(name), "on_change": _take, "args": (name, read, then)}


def _among(given: Sequence[Any], options: Sequence[Any]) -> list[Any]:
    """The options that equal one of the values, each once, in the order of these; a flag is no number."""
    equal = lambda each, one: each == one and isinstance(each, bool) == isinstance(one, bool)  # noqa: E731
    found = [next((one for one in options if equal(each, one)), None) for each in given]
    return list(dict.fromkeys(one for one in found if one is not None))


def fitting(state: State, name: str, options: Sequence[Any], default: Any) -> Any:
    """The state's value among the options, whether it came as itself or as text of an address; else the default."""
    value = state.get(name, default)
    if found := _among([value], options):
        return found[0]
    for option in options:
        if str(option) == str(value):
            return option
    fallback = default if default in options else next(iter(options), None)
    if name in state.settings:
        state.notices.append(f"{name} has no {str(value)[:40]!r} here; showing {str(fallback)!r}.")
        del state.settings[name]
    return fallback


def choice(
    state: State, name: str, label: str, options: Sequence[Any], default: Any = None, *, show: Show = str,
    then: Callable[[State], None] | None = None, **more: Any,
) -> Any:  # fmt: skip
    """A selectbox; `then(state)` follows a change."""
    value = fitting(state, name, options, default if default is not None else next(iter(options), None))
    st.selectbox(label, options, format_func=show, **_bound(name, value, then=then), **more)
    return value


def segments(
    state: State,
    name: str,
    label: str,
    options: Sequence[Any],
    default: Any = None,
    *,
    show: Show = str,
    **more: Any,
) -> Any:
    """A row of buttons of which one is pressed."""
    value = fitting(state, name, options, default if default is not None else options[0])
    st.segmented_control(
        label,
        options,
        format_func=show,
        **_bound(name, value, lambda new: value if new is None else new),
        **{"wrap": True, **more},
    )
    return value


def toggle(state: State, name: str, label: str, default: bool = False, **more: Any) -> bool:
    value = state.get(name, default)
    value = value if isinstance(value, bool) else default
    st.toggle(label, **_bound(name, value), **more)
    return value


def several(
    state: State, name: str, label: str, options: Sequence[Any], default: Sequence[Any] = (), *, show: Show = str,
    **more: Any,
) -> list[Any]:  # fmt: skip
    """A multiselect; what is not among the options is dropped."""
    given = state.get(name, list(default))
    given = given if isinstance(given, list) else [given]
    value = _among(given, options)
    st.multiselect(label, options, format_func=show, **_bound(name, value), **more)
    return value


def chips(
    state: State, name: str, label: str, options: Sequence[Any], default: Sequence[Any] = (), *, show: Show = str,
    **more: Any,
) -> list[Any]:  # fmt: skip
    """The same as `several`, as small buttons, each of which is on or off."""
    given = state.get(name, list(default))
    given = given if isinstance(given, list) else [given]
    value = [each for each in options if each in _among(given, options)]
    st.pills(
        label,
        options,
        selection_mode="multi",
        format_func=show,
        **_bound(name, value, list),
        **{"wrap": True, **more},
    )
    return value


def held_number(state: State, name: str, low: float | None, high: float | None, default: float) -> Any:
    """The number that a field or slider of this name shows: the state's where it fits, else the default."""
    value, whole = state.get(name, default), isinstance(default, int)
    fits = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST
    fits = fits and (not whole or value == int(value))
    fits = fits and (low is None or value >= low) and (high is None or value <= high)
    return (int if whole else float)(value) if fits else default


def _tell_replaced(state: State, name: str, value: Any) -> None:
    """Say so where a number of an address gave way to the default."""
    held = state.settings.get(name)
    if held is None or held == (
        list(value) if isinstance(value, tuple) and isinstance(held, list) else value
    ):
        return
    state.notices.append(f"{name} can not be {str(held)[:40]!r} here; showing {value}.")
    del state.settings[name]


def _held_range(state: State, name: str, low: float, high: float, default: tuple, kind: type) -> tuple:
    try:
        first, last = (kind(each) for each in state.get(name, default))
    except (TypeError, ValueError, OverflowError):
        return default
    return (first, last) if low <= first <= last <= high else default


def slider(
    state: State,
    name: str,
    label: str,
    low: float,
    high: float,
    default: Any,
    step: float | None = None,
    **more: Any,
) -> Any:
    """A slider of a number, or of two (a range) where the default is a pair."""
    kind = int if isinstance(low, int) and isinstance(high, int) else float
    pair = isinstance(default, tuple)
    value = _held_range(state, name, low, high, default, kind) if pair else held_number(
        state, name, low, high, kind(default)
    )  # fmt: skip
    _tell_replaced(state, name, value)
    st.slider(label, low, high, step=step, **_bound(name, value, list if pair else None), **more)
    return value


def number(
    state: State, name: str, label: str, low: float | None, high: float | None, default: float,
    step: float | None = None, **more: Any,
) -> Any:  # fmt: skip
    value = held_number(state, name, low, high, default)
    _tell_replaced(state, name, value)
    st.number_input(label, min_value=low, max_value=high, step=step, **_bound(name, value), **more)
    return value


def text(
    state: State,
    name: str,
    label: str,
    default: str = "",
    *,
    then: Any = None,
    area: bool = False,
    **more: Any,
) -> str:
    value = state.get(name, default)
    value = default if value is None else str(value)
    draw = st.text_area if area else st.text_input
    draw(label, **_bound(name, value, then=then), **more)
    return value
