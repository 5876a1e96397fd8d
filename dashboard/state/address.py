"""The state as the parameters of an address, and back.

What is at its default is left out. A text too long for an address, and a view too long for one, are kept in the
workspace under their digests, so that such a link still shows the view after a restart. Values come from strangers:
each that does not fit is replaced, and every replacement is told.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any, get_args
from urllib.parse import urlencode

from headwater.dashboard.state import workspace
from headwater.dashboard.state.state import Setting, Shown, State
from headwater.lens.errors import EditError, HeadwaterError
from headwater.lens.files import parse_json
from headwater.lens.naming.heads import Head

LONGEST_TEXT = 400
LONGEST_ADDRESS = 1800
LONGEST_EDITS = 200_000
LONGEST_SETTING = 4000
DEEPEST = 6  # a pinned result is a list of objects with settings, which may be lists
NAMES = {
    "text": "prompt",
    "b_text": "b_prompt",
    "b_model": "b_model",
}  # where a parameter is called otherwise
TEXTS = ("text", "decoder", "b_text")
PLAIN = {
    each.name: each for each in fields(State) if each.name not in ("settings", "notices", "edits", "pins")
}
SETTING = re.compile(r"[a-z]{1,20}\.[a-z0-9_]{1,40}")
SHOWN = get_args(Shown)
CheckEdits = Callable[[list[dict]], object]


def to_address(state: State) -> dict[str, str]:
    """The parameters that hold the state; {"view": digest} where they would be too long."""
    found = _parameters(state)
    if len(urlencode(found)) <= LONGEST_ADDRESS:
        return found
    try:
        content = json.dumps(found, sort_keys=True, separators=(",", ":")).encode()
        return {"view": workspace.keep("views", content)}
    except HeadwaterError as error:
        told = f"This view is too long for its address and can not be kept: {error}. A link shows it without edits."
        if told not in state.notices:
            state.notices.append(told)
        return {name: value for name, value in found.items() if name != "edits"}


def from_address(parameters: Mapping[str, str], models: Sequence[str], check_edits: CheckEdits) -> State:
    """The state that an address holds; the first of `models` where it names none that is offered."""
    state = State(model=models[0])
    tell = state.notices.append
    if "view" in parameters:
        held = workspace.kept_json("views", parameters["view"])
        if isinstance(held, dict) and all(isinstance(value, str) for value in held.values()):
            parameters = held
        else:
            tell("The view of this link is not kept on this machine; showing the first view.")
    if _offered(wanted := parameters.get("model", state.model), models):
        state.model = wanted
    elif wanted.startswith(workspace.RECORD):
        tell(f"The record of this link is not kept on this machine; upload it here. Showing {state.model}.")
    else:
        tell(
            f"Model {wanted[:60]!r} is not offered here; showing {state.model}. Start with it: headwater dashboard "
            "MODEL."
        )
    if (other := parameters.get("b_model")) is not None:
        if _offered(other, models):
            state.b_model = other
        else:
            tell(f"Model {other[:60]!r} of run B is not offered here; run B has the model of run A.")
    read = [_read_text(name, parameters, state) for name in TEXTS]
    if not all(read):
        # positions of a text that is gone would mean other tokens
        parameters = {
            name: value for name, value in parameters.items() if name not in ("edits", "query", "key")
        }
    for name in ("layer", "head", "query", "key", "answer", "wrong"):
        _read_whole(name, parameters, state)
    for name in ("picture", "part", "kind"):
        text = parameters.get(name, "")
        if len(text) <= 100 and text.isprintable():
            setattr(state, name, text)
    if (shown := parameters.get("shown", "a")) in SHOWN:
        state.shown = shown  # type: ignore[assignment]
    state.pins = _pins(parameters.get("pins", ""), state)
    state.edits = _edits(parameters.get("edits", "[]"), state, check_edits)
    state.settings = _settings(parameters, state)
    return state


def _offered(name: str, models: Sequence[str]) -> bool:
    """Whether a model is among those offered, or a record that was uploaded here, which only its link names."""
    digest = name.removeprefix(workspace.RECORD)
    return name in models or (digest != name and workspace.place("records", digest) is not None)


def _parameters(state: State) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, each in PLAIN.items():
        value = getattr(state, name)
        if name not in ("model", "layer", "head") and value == each.default:
            continue
        if name in TEXTS and len(value) > LONGEST_TEXT:
            try:
                found[f"{NAMES.get(name, name)}_id"] = workspace.keep(
                    "texts", value.encode("utf-8", "replace")
                )
                continue
            except HeadwaterError as error:
                told = f"This text is too long for an address and can not be kept: {error}."
                if told not in state.notices:
                    state.notices.append(told)
        found[NAMES.get(name, name)] = str(value)
    if state.edits:
        found["edits"] = json.dumps(state.edits, separators=(",", ":"))
    if state.pins:
        found["pins"] = ",".join(state.pins)
    for name, value in sorted(state.settings.items()):
        # a text that would be read as a number or a list stands in quotes
        found[name] = value if isinstance(value, str) and _read(value) == value else json.dumps(value)
    return found


def _read_text(name: str, parameters: Mapping[str, str], state: State) -> bool:
    """Take a text from the address or the workspace; False where it is gone."""
    called = NAMES.get(name, name)
    if called in parameters:
        setattr(state, name, parameters[called])
    elif (kept := parameters.get(f"{called}_id")) is not None:
        content = workspace.kept("texts", kept)
        if content is None:
            state.notices.append(
                f"The {called} of this link was too long for the address and is not kept on this machine; showing "
                "another, without the edits of the link."
            )
            return False
        setattr(state, name, content.decode("utf-8", "replace"))
    return True


def _read_whole(name: str, parameters: Mapping[str, str], state: State) -> None:
    text = parameters.get(name)
    if text is None:
        return
    if text.isascii() and text.isdigit() and len(text) < 8:
        setattr(state, name, int(text))
    else:
        state.notices.append(
            f"The address gives {name}={text[:20]!r}, which is no whole number from 0 up; showing the first."
        )


def _pins(text: str, state: State) -> list[str]:
    found = []
    for name in text[:4000].split(",") if text else []:
        try:
            for head in name.split(">"):
                Head.parse(head)
            found.append(name)
        except HeadwaterError:
            state.notices.append(
                f"The address pins {name[:20]!r}, which is no head and no edge; it is left out."
            )
    return list(dict.fromkeys(found))


def _settings(parameters: Mapping[str, str], state: State) -> dict[str, Setting]:
    """The settings of pages: texts, numbers, flags and lists; any other value gives way to the page's default."""
    found: dict[str, Setting] = {}
    for name, text in parameters.items():
        if not SETTING.fullmatch(name):
            continue
        value = _read(text) if len(text) < LONGEST_SETTING else None
        if isinstance(value, str | int | float | list) and _depth(value) <= DEEPEST:
            found[name] = value
        else:
            state.notices.append(
                f"The address gives {name}={text[:40]!r}, which is no setting; showing the default."
            )
    return found


def _read(text: str) -> Any:
    """What a setting's text says as JSON; else the text itself."""
    try:
        return parse_json(text, "the address", HeadwaterError)
    except HeadwaterError:
        return text


def _depth(value: Any) -> int:
    """How many lists and objects stand inside each other."""
    level, depth = [value], 0
    while level := [each for each in level if isinstance(each, list | dict)]:
        depth += 1
        level = [one for each in level for one in (each.values() if isinstance(each, dict) else each)]
    return depth


def _edits(text: str, state: State, check: CheckEdits) -> list[dict]:
    """Edits as they stand in an address; each is checked as an edit, and none is taken if one is wrong."""
    try:
        if len(text) > LONGEST_EDITS:
            raise ValueError("too long")
        edits = parse_json(text, "the text", EditError)
        if not isinstance(edits, list) or not all(isinstance(edit, dict) for edit in edits):
            raise ValueError("not a list of edits")
        check([{name: value for name, value in edit.items() if name != "off"} for edit in edits])
    except (ValueError, TypeError, KeyError, RecursionError, HeadwaterError) as error:
        state.notices.append(
            f"The edits of the address can not be read ({str(error)[:120]}); starting without edits."
        )
        return []
    return edits
