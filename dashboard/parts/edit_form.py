"""The form of one edit: its kind, what that kind asks for, and recipes; it gives the edits once a button is pressed."""

from __future__ import annotations

import json
from typing import Any

import streamlit as st

import headwater as hw
from headwater.dashboard.figures.labels import cut, visible
from headwater.dashboard.parts.edits import RULES
from headwater.dashboard.parts.head_choice import heads_input, layers_input
from headwater.dashboard.running.edit_kinds import COMMON, NOT_HERE, Ask, EditKind, kinds
from headwater.dashboard.running.made_edits import (
    DIRECTIONS,
    RECIPES,
    direction,
    directions,
    fitting_recipes,
    has_image_tokens,
    has_words,
    made,
    made_by,
    takes_texts,
)
from headwater.dashboard.running.measure import Measure
from headwater.dashboard.running.runs import Run
from headwater.dashboard.state import bound, session
from headwater.dashboard.state.state import State
from headwater.dashboard.widgets import plain
from headwater.lens.errors import HeadwaterError
from headwater.lens.models.embedded import embedded
from headwater.lens.prompts import prompt_set

MORE = "more"
MOST_CHIPS = 64
GROUPS = {
    "special": "special tokens",
    "image": "image tokens",
}
HOW = {
    "chosen": "chosen tokens",
    "all": "all tokens",
    "others": "all others",
    "word": "every place of a word",
    **{f"sinks:{rule}": f"sinks: {words}" for rule, words in RULES.items()},
    **GROUPS,
}


def draw(state: State, run: Run, model: hw.HookedModel, measure: Measure) -> list[dict] | None:
    """The inputs of the chosen kind; gives the edits once the button is pressed."""
    kind = _kind(state)
    if kind is None:
        return _recipe(state, run, model)
    st.caption(plain(kind.meaning))
    given: dict[str, Any] = {}
    missing: list[str] = []
    for ask in kind.asks:
        if ask.kind == "texts" and given.get("ablation") == "zero":
            continue
        value = _answer(state, ask, kind, run, model, measure)
        if value is None or (ask.needed and value == []):
            missing.append(ask.label)
        elif ask.kind in ("heads", "layers"):
            given |= value
        else:
            given[ask.name] = value
    pressed = st.button("Add this edit", type="primary", disabled=bool(missing), key="add-edit")
    if missing:
        st.caption(plain(f"Still to choose: {', '.join(missing).lower()}."))
    if not pressed:
        return None
    try:
        return [made(kind, given, model, run.example)]
    except (HeadwaterError, TypeError, ValueError) as error:
        st.error(plain(str(error)))
        return None


def _kind(state: State) -> EditKind | None:
    """The chosen kind of edit; None for a recipe."""
    every = kinds()
    common = bound.segments(
        state, "edit.kind", "Edit", [*COMMON, MORE], COMMON[0],
        show=lambda name: every[name].title if name in every else "more …",
    )  # fmt: skip
    if common != MORE:
        return every[common]
    rest = [name for name in every if name not in COMMON]
    chosen = bound.choice(
        state, "edit.more", "Further edits", ["recipes", *rest], rest[0],
        show=lambda name: every[name].title if name in every else "Published recipes",
    )  # fmt: skip
    with st.popover("What is not here", icon=":material/info:"):
        for name, why in NOT_HERE.items():
            st.markdown(plain(f"{name}: {why}."))
    return every.get(chosen)


def _recipe(state: State, run: Run, model: hw.HookedModel) -> list[dict] | None:
    """A published recipe that fits the model; gives its edits once the button is pressed."""
    offered = fitting_recipes(model)
    name = bound.choice(state, "edit.recipe", "Recipe", offered, show=lambda each: RECIPES[each].title)
    about = getattr(hw.recipes, name).__doc__ or ""
    st.caption(plain(about.strip().partition("\n\n")[0].replace("`", "")))
    heads = heads_input(state, model, needed=False)
    if not st.button("Add this recipe", type="primary", key="add-edit"):
        return None
    try:
        return made_by(name, model, run.example, heads.get("heads", "all"))
    except HeadwaterError as error:
        st.error(plain(str(error)))
        return None


def _answer(state: State, ask: Ask, kind: EditKind, run: Run, model: hw.HookedModel, measure: Measure) -> Any:
    """What the person gave for one thing asked; None where it is still missing."""
    name = f"edit.{kind.name.lower()}_{ask.name}"
    if ask.kind == "heads":
        return heads_input(state, model, ask.needed) or None
    if ask.kind == "layers":
        return layers_input(state, model)
    if ask.kind == "layer":
        return bound.choice(state, name, ask.label, model.layers)
    if ask.kind == "tokens":
        return tokens_input(state, name, ask, run, model)
    if ask.kind == "number":
        return bound.slider(
            state, name, ask.label, ask.low or 0.0, ask.high or 0.0, float(ask.default), ask.step
        )
    if ask.kind == "whole":
        return bound.number(state, name, ask.label, ask.low, ask.high, ask.default, ask.step)
    if ask.kind == "choice":
        needs_texts = any(each.kind == "texts" for each in kind.asks) and not takes_texts(model)
        return bound.choice(
            state, name, ask.label, [ask.default] if needs_texts else ask.options, ask.default
        )
    if ask.kind == "flag":
        return bound.toggle(state, name, ask.label, ask.default)
    if ask.kind == "direction":
        which = bound.choice(
            state, f"{name}_of", ask.label, directions(model, measure), show=DIRECTIONS.__getitem__
        )
        written = _written(state, name, "Numbers, [1, 0, …]") if which == "numbers" else ""
        try:
            return direction(which, written, model, measure)
        except HeadwaterError as error:
            st.caption(plain(str(error)))
            return None
    if ask.kind == "texts":
        return bound.text(state, name, ask.label, _other_texts(model, len(run.queries)), area=True)
    written = _written(state, name, ask.label, "" if ask.default is None else str(ask.default))
    return written or None


def _written(state: State, name: str, label: str, default: str = "") -> str:
    """Text that is read as JSON; an address gives it as what it says."""
    held = state.get(name)
    if held is not None and not isinstance(held, str):
        state.put(name, json.dumps(held))
    return bound.text(state, name, label, default)


def tokens_input(state: State, name: str, ask: Ask, run: Run, model: hw.HookedModel) -> Any:
    """Positions as chips, or a name for them: a group, a word, or the sinks by a rule."""
    how = [each for each in HOW if each != "others" or ask.name in ("to", "source")]
    how = [each for each in how if each != "all" or ask.name != "to"]  # it is taken from somewhere
    crosses = model.parts[model.part_name].crosses
    if not has_words(model, ask.name):
        how = [each for each in how if each != "word" and (each != "special" or not crosses)]
    how = [each for each in how if each != "sinks:massive" or not crosses]  # which are of one stream
    how = [each for each in how if each != "image" or has_image_tokens(model)]
    if ask.name in ("queries", "positions"):
        how = [each for each in how if not each.startswith("sinks:")]
    first = ask.default if ask.default in how else "chosen"
    way = bound.choice(state, f"{name}_by", ask.label, how, first, show=HOW.__getitem__)
    if way == "word":
        word = bound.text(state, f"{name}_word", "Word", placeholder="Mary")
        return f"token:{word}" if word else None
    if way == "sinks:share":
        share = bound.slider(
            state, f"{name}_share", "A sink receives at least this share", 0.05, 1.0, 0.3, 0.05
        )
        return f"sinks:share:{share:g}"
    if way != "chosen":
        return way
    tokens = run.queries if ask.name == "queries" else run.keys
    default = {"keys": [0], "source": [0], "queries": [len(tokens) - 1]}.get(ask.name, [])
    default = [] if name == "edit.knockout_keys" else default  # no first guess at what must not be seen
    draw = bound.chips if len(tokens) <= MOST_CHIPS else bound.several
    show = lambda place: f"{place} {cut(visible(tokens[place]), 14)}"  # noqa: E731
    return draw(state, name, ask.label, range(len(tokens)), default, show=show, label_visibility="collapsed")


@st.cache_data(show_spinner=False)
def _texts_of(_model: hw.HookedModel, name: str, own: bool) -> list[str]:
    found = prompt_set("indirect_object", 16) if own else prompt_set("indirect_object", 16, model=_model)
    return [each.prompt for each in found]


def _other_texts(model: hw.HookedModel, length: int) -> str:
    """Other texts to take outputs from: those of the prompt sets that are long enough."""
    try:
        texts = _texts_of(model, model.name, model.name in embedded())
        return "\n".join(text for text in texts if model.to_tokens(text).ids.shape[1] >= length)
    except HeadwaterError:  # its words are others, or it reads more than a text
        return ""


def add(state: State, edits: list[dict]) -> None:
    """Put edits of the part that is shown at the end of the list, and draw the page anew with run B."""
    state.edits.extend(state.on_part(edit) for edit in edits)
    session.again()
