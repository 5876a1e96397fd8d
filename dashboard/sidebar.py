"""Model, prompt and head: chosen once, kept on every page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress

import streamlit as st

import headwater as hw
from headwater.dashboard import runs
from headwater.dashboard.state import State, first_prompt
from headwater.dashboard.widgets import plain, select
from headwater.lens.errors import PromptError
from headwater.lens.models.embedded import embedded
from headwater.lens.prompts import prompt_set, prompt_sets

MOST_LETTERS = 200_000
EACH = 2  # examples of a prompt set
WRITTEN = (
    "The capital of France is",
    "The keys to the cabinet",
    "Once upon a time there was a little girl who",
    "The ferry of Thornbury left at noon. Nobody on the quay had seen Thorn",
    "1, 2, 3, 4, 5, 6,",
)


def draw(state: State) -> None:
    names = runs.offered()
    before, state.model = state.model, select("Model", names, state.model, "chosen-model")
    with st.spinner("Loading the model …"):
        model = runs.resident(state.model)
    state.fit(model.layers, model.n_heads)
    if state.model != before and state.prompt == first_prompt(before):  # nobody typed it
        state.prompt = st.session_state["chosen-prompt"] = first_prompt(state.model)
    st.session_state.setdefault("chosen-prompt", state.prompt)
    _examples(model)
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


def _examples(model: hw.HookedModel) -> None:
    """Prompts that suit the model; a choice goes into the text field."""
    key = f"example-{model.name}"
    prompts = _held_out() if model.name in embedded() else _drawn(model.name, model)

    def take() -> None:
        st.session_state["chosen-prompt"] = prompts[st.session_state[key]]

    if prompts:
        st.selectbox(
            "Example prompts", list(prompts), None, key=key, placeholder="choose one", on_change=take
        )


@st.cache_data
def _held_out() -> dict[str, str]:
    """Held-out prompts of the tasks that the embedded models learnt."""
    return _named({name: [each.prompt for each in prompt_set(name, EACH)] for name in prompt_sets()})


@st.cache_data
def _drawn(model: str, _model: hw.HookedModel) -> dict[str, str]:
    """Texts as people write them, and those prompt sets that can be drawn from the words of the model's tokenizer."""
    found = {}
    for name in prompt_sets(_model.tokenizer) if _model.causal else ():
        with suppress(PromptError):  # its tokenizer splits the words of this set
            found[name] = [each.prompt for each in prompt_set(name, EACH, model=_model)]
    return {text: text for text in WRITTEN} | _named(found)


def _named(sets: Mapping[str, Sequence[str]]) -> dict[str, str]:
    return {
        f"{name.replace('-', ' ').replace('_', ' ')} {number}": prompt
        for name, prompts in sets.items()
        for number, prompt in enumerate(prompts, 1)
    }
