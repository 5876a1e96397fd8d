"""Example texts that suit a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress

import streamlit as st

import headwater as hw
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


def prompts_for(model: hw.HookedModel) -> dict[str, str]:
    """Texts by name: held-out prompts of the tasks of an embedded model, else texts as people write them."""
    return _held_out() if model.name in embedded() else _drawn(model.name, model)


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
