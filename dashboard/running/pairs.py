"""The corrupt input beside the clean one, for analyses that compare two runs of a model.

It is run B's text, or one typed on a page, or one that is found: the text with the answer in the place of
the name said last, the other prompt of a prompt set, or another prompt as long. Of models of pictures it is another
sample.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import headwater as hw
from headwater.dashboard.running.inputs import SAMPLE, given
from headwater.dashboard.running.measure import Measure
from headwater.dashboard.running.models import reads, resident
from headwater.dashboard.state.state import State
from headwater.lens.errors import HeadwaterError, PromptError
from headwater.lens.examples.sample_pictures import sample_pictures
from headwater.lens.models.embedded import embedded
from headwater.lens.prompts import prompt_set, prompt_sets

SEARCHED = 40  # prompts of each set that are looked through
TYPED = "pair.text"  # the settings of pages that hold a corrupt input
PICTURE = "pair.picture"


@dataclass(frozen=True)
class Corrupt:
    """An input, the key under which results on it are kept, and where it comes from in words."""

    example: hw.Example | str
    key: tuple[str, str, str]
    told: str


def corrupt(state: State, chosen: Measure) -> Corrupt:
    """The corrupt input of a state. PromptError where none is known and none is typed."""
    if pictures(state):
        return _of_picture(state)
    if state.b_text is not None:
        return _of_text(state, state.b_text, "the text of run B")
    if typed := str(state.get(TYPED, "")):
        return _of_text(state, typed, "as typed here")
    for text, told in found(state, chosen):
        return _of_text(state, text, told)
    raise PromptError(
        "no corrupt prompt is known for this text; type one with as many tokens, of which the answer is another"
    )


def pictures(state: State) -> list[str]:
    """The samples that may stand in the place of the picture; empty for models of texts."""
    if not reads(resident(state.model)).picture:
        return []
    return [SAMPLE + name for name in sample_pictures(state.model) if SAMPLE + name != state.picture]


def found(state: State, chosen: Measure) -> Iterator[tuple[str, str]]:
    """Texts of as many tokens whose answer differs, the likest first, each with where it comes from."""
    model = resident(state.model)
    swapped = _swapped(state, chosen)
    if swapped is not None and _tokens(model, swapped) == _tokens(model, state.text):
        yield swapped, "the same text with the answer for the name said last"
    if model.name not in embedded() or sample_pictures(state.model):
        return
    count, words = _tokens(model, state.text), state.text.split()
    others = []
    for name in prompt_sets():
        for each in prompt_set(name, SEARCHED):
            if each.prompt == state.text and each.corrupt:
                yield each.corrupt, f"the other prompt of the set {name.replace('_', ' ')}"
            elif _tokens(model, each.prompt) == count:
                same = sum(one == other for one, other in zip(each.prompt.split(), words, strict=False))
                others.append((-same, each.prompt, f"a prompt of the set {name.replace('_', ' ')}"))
    yield from ((text, told) for _, text, told in sorted(others))


def _swapped(state: State, chosen: Measure) -> str | None:
    """The text with the answer for the last name that stands in it twice, or else for the distractor."""
    if chosen.answer is None or chosen.wrong is None:
        return None
    answer, wrong = (chosen.plain.label(each).strip() for each in (chosen.answer, chosen.wrong))
    words = re.findall(r"\w+", state.text)
    twice = [w for w in words[::-1] if w[0].isupper() and words.count(w) > 1 and w != answer]
    wrong = twice[0] if twice else wrong
    if wrong not in words or answer not in words:
        return None
    before, _, after = state.text.rpartition(wrong)
    return before + answer + after


def _tokens(model: hw.HookedModel, text: str) -> int:
    with suppress(HeadwaterError):
        return model.to_tokens(text).ids.shape[1]
    return 0


def _of_text(state: State, text: str, told: str) -> Corrupt:
    what = given(state, resident(state.model), text)
    return Corrupt(what.example, what.key, told)


def _of_picture(state: State) -> Corrupt:
    offered = pictures(state)
    name: Any = state.get(PICTURE, offered[0])
    name = name if name in offered else offered[0]
    other = State(**{**vars(state), "picture": name, "notices": []})
    what = given(other, resident(state.model))
    return Corrupt(what.example, what.key, f"the sample {name.removeprefix(SAMPLE)}")
