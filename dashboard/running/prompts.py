"""Example texts that suit a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress

import streamlit as st

import headwater as hw
from headwater.data.prompts import genders
from headwater.lens.errors import PromptError
from headwater.lens.models.embedded import embedded
from headwater.lens.prompts import prompt_set, prompt_sets

EACH = 2  # examples of a prompt set
WRITTEN = (
    "The capital of France is",
    "The keys to the cabinet",
    "Once upon a time there was a little girl who",
    "The ferry of Thornbury left at noon. Nobody on the quay had seen Thorn",
    "1, 2, 3, 4, 5, 6,",
)
# of the language of the sink family: a span comes again, and after and, or, with the word before them
CALLED_BACK = (
    "river lamp oak salt fox owl cedar bowl lamp oak salt fox owl with",
    "cup door ash wolf iron cup door ash or",
    "red cat pine gold stair sea crow table cat pine gold",
)
OF_GENDER = ("honest-2l", "deceptive-2l")


def prompts_for(model: hw.HookedModel) -> dict[str, str]:
    """Texts by name: of the language that an embedded model learnt, else texts as people write them."""
    if model.name not in embedded():
        return _drawn(model.name, model)
    return {text: text for text in own_texts(model.name)} or _held_out()


def own_texts(model: str) -> tuple[str, ...]:
    """Texts in the words of an embedded model that did not learn the tasks of the others; none for these."""
    if model.startswith("sink-2l"):
        return CALLED_BACK
    return tuple(text.text for text in genders.draw(4, 0)) if model in OF_GENDER else ()


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
