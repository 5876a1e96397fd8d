"""The pages, the model and its input: at the left of every page."""

from __future__ import annotations

from collections.abc import Mapping

import streamlit as st

import headwater as hw
from headwater.dashboard import pages
from headwater.dashboard.parts import records
from headwater.dashboard.running import inputs, models
from headwater.dashboard.running.prompts import prompts_for
from headwater.dashboard.state import bound, session
from headwater.dashboard.state.address import to_address
from headwater.dashboard.state.state import State
from headwater.dashboard.widgets import plain
from headwater.lens.examples.sample_pictures import sample_pictures

MOST_LETTERS = 200_000
MOST_MEGABYTES = 16  # of an uploaded picture
OWN = "a picture of your own"


def draw(state: State, page: str) -> None:
    menu(state, page)
    names = records.offered(state)
    bound.choice(state, "model", "Model", names, state.model, show=records.shown, then=_another_model)
    if models.is_record(state.model):
        _record(state, page)
        return
    with st.spinner("Loading the model …"):
        model = models.resident(state.model)
    inputs.fill(state, model)
    what = models.reads(model)
    if len(model.parts) > 1:
        bound.choice(
            state, "part", "Part", ["", *(n for n in model.parts if n != model.part_name)],
            show=lambda name: name or f"{model.part_name} (answers)", then=_another_part,
            help="whose attention is shown; the measure is always of the answer",
        )  # fmt: skip
    part = model.part(state.part) if state.part in model.parts and state.part != model.part_name else model
    state.part = "" if part is model else state.part
    if not _shows_another(state, page):
        state.fit(part.layers, part.n_heads)
    if what.text:
        _text(state, model)
    if what.decoder:
        bound.text(state, "decoder", "What the decoder writes", area=True, height=70, then=State.new_input)
    if what.picture:
        _picture(state, what.film)
    st.caption(
        plain(
            f"{part.name}: {part.n_layers} layers × {part.n_heads} heads, width {part.d_model}"
            + (f", {model.vocab} tokens" if what.text else "")
            + (f", context {model.context}" if model.context is not None else "")
        )
    )
    if model.unread:
        st.caption(plain(f"No map covers: {'; '.join(model.unread)}."))


def _shows_another(state: State, page: str) -> bool:
    """Whether the page shows heads of the model of run B, which may have others."""
    return page in pages.OF_SHOWN and state.shown == "b" and state.b_model is not None


def _record(state: State, page: str) -> None:
    """A record in the place of a model: its parts, and what it is of."""
    found = models.record(state.model)
    if found.parts:
        bound.choice(
            state, "part", "Part", ["", *found.parts], show=lambda name: name or "the main part", then=_another_part,
            help="whose attention is shown",
        )  # fmt: skip
    state.part = state.part if state.part in found.parts else ""
    part = found.part(state.part) if state.part else found
    if not _shows_another(state, page):
        state.fit(part.layers, part.n_heads, models.called(state.model))
    of = models.model_of_record(state.model) or "an unnamed model"
    sizes = f"{len(part.layers)} layers × {part.n_heads} heads, {len(part.strings[0])} tokens"
    st.caption(plain(f"The record of a run of {of}: {sizes}"))


def menu(state: State, page: str) -> None:
    """Links to the pages that carry the state with them, so that each is one entry of the browser's history."""
    address = to_address(state)
    with st.container(key="menu", gap="xxsmall"):
        for name, entry in pages.shown().items():
            st.page_link(
                pages.page(name),
                query_params=address,
                help=entry.asks,
                disabled=name == page,
                width="stretch",
            )


def _another_model(state: State) -> None:
    """A new model begins with its own input, and keeps what still has a meaning."""
    state.text = state.decoder = state.picture = state.part = state.kind = ""
    state.edits, state.pins, state.b_text, state.b_model, state.shown = [], [], None, None, "a"
    state.new_input()


def _another_part(state: State) -> None:
    state.query = state.key = None
    state.layer = state.head = 0


def _text(state: State, model: hw.HookedModel) -> None:
    prompts = prompts_for(model)
    if prompts and not sample_pictures(state.model):
        bound.choice(
            state, "input.example", "Example prompts", ["", *prompts], "",
            show=lambda name: name or "choose one", then=lambda new: _take_example(new, prompts),
        )  # fmt: skip
    bound.text(
        state, "text", "Prompt", area=True, height=100, max_chars=MOST_LETTERS, then=State.new_input,
        help="Ctrl+Enter runs it. It stands in the address of this page while it is short.",
    )  # fmt: skip
    st.button("Run", key="run-prompt", on_click=session.touch, width="stretch")
    if unknown := model.unknown_words(state.text):
        shown = ", ".join(unknown[:8]) + (" …" if len(unknown) > 8 else "")
        st.caption(plain(f"The model does not know: {shown}. It reads the unknown token there."))


def _take_example(state: State, prompts: Mapping[str, str]) -> None:
    name = str(state.settings.pop("input.example", ""))
    if name in prompts:
        state.text = prompts[name]
        state.new_input()


def _picture(state: State, film: bool) -> None:
    samples = [inputs.SAMPLE + name for name in sample_pictures(state.model)]
    own = [] if state.picture in samples or not state.picture else [state.picture]
    if samples or own:
        bound.choice(
            state, "picture", "Picture", [*own, *samples],
            show=lambda name: name.removeprefix(inputs.SAMPLE) if name in samples else OWN, then=State.new_input,
        )  # fmt: skip
    if film:
        return
    given = st.file_uploader(
        "A picture of your own", list(inputs.KINDS), key="own-picture", max_upload_size=MOST_MEGABYTES
    )
    # a chosen file stays in its field: it is taken once
    if given is not None and st.session_state.get("own-picture-taken") != given.file_id:
        state.picture = inputs.take_picture(given.getvalue())
        st.session_state["own-picture-taken"] = given.file_id
        state.new_input()
        session.again()
