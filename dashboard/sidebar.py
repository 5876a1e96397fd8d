"""Model, prompt and head: chosen once, kept on every page."""

from __future__ import annotations

import streamlit as st

from headwater.dashboard import runs
from headwater.dashboard.state import State
from headwater.dashboard.widgets import plain, select
from headwater.lens.prompts import prompt_set, prompt_sets

MOST_LETTERS = 200_000


def draw(state: State) -> None:
    names = runs.offered()
    state.model = select("Model", names, state.model, "chosen-model")
    with st.spinner("Loading the model …"):
        model = runs.resident(state.model)
    state.fit(model.layers, model.n_heads)
    st.session_state.setdefault("chosen-prompt", state.prompt)
    _examples()
    typed = st.text_area(
        "Prompt",
        key="chosen-prompt",
        height=130,
        max_chars=MOST_LETTERS,
        help="Ctrl+Enter runs it. It stands in the address of this page while it is short.",
    )
    state.prompt = typed or ""
    if unknown := model.unknown_words(state.prompt):
        shown = ", ".join(unknown[:8]) + (" …" if len(unknown) > 8 else "")
        st.caption(plain(f"The model does not know: {shown}. It reads the unknown token there."))
    left, right = st.columns(2)
    with left:
        layer = select("Layer", model.layers, state.layer, "chosen-layer")
    with right:
        head = select("Head", list(range(model.n_heads)), state.head, "chosen-head")
    state.choose_head(layer, head)
    st.caption(
        plain(
            f"{model.name}: {model.n_layers} layers × {model.n_heads} heads, width {model.d_model}, "
            f"{model.vocab} tokens, context {model.context}"
        )
    )
    if model.unread:
        st.caption(plain(f"No map covers: {'; '.join(model.unread)}."))


def _examples() -> None:
    """Held-out prompts of the tasks that the embedded models learnt; a choice goes into the text field."""
    prompts = _held_out()

    def take() -> None:
        st.session_state["chosen-prompt"] = prompts[st.session_state["example"]]

    if prompts:
        st.selectbox(
            "Example prompts", list(prompts), None, key="example", placeholder="choose one", on_change=take
        )


@st.cache_data
def _held_out() -> dict[str, str]:
    found = {}
    for name in prompt_sets():
        for number, example in enumerate(prompt_set(name, 2), 1):
            found[f"{name.replace('-', ' ').replace('_', ' ')} {number}"] = example.prompt
    return found
