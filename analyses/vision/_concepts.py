"""Concepts as words in their places: `digit: bright {one|two} left; place: bright one {left|right}`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from headwater.analyses.vision._drawings import Pair, recorded
from headwater.lens.diffusion.model import DiffusionModel
from headwater.lens.errors import AnalysisError
from headwater.lens.running.denoising import CONDITIONAL

Concepts = str | Mapping[str, str | Sequence[str]]
PLACE = re.compile(r"([^{}]*)\{([^{}]+)\}([^{}]*)")


@dataclass(frozen=True)
class Word:
    """A word of a concept in its text, which is characters `begin` to `end` of it."""

    text: str
    begin: int
    end: int


def words_of(concepts: Concepts) -> dict[str, list[Word]]:
    """The words of each concept; AnalysisError for fewer than two concepts, or one without words."""
    if isinstance(concepts, str):
        given = [each.partition(":") for each in concepts.split(";") if each.strip()]
        concepts = {name.strip(): phrase for name, _, phrase in given}
    phrases = {n: [p] if isinstance(p, str) else list(p) for n, p in concepts.items()}
    found = {name: [word for phrase in some for word in _words(phrase)] for name, some in phrases.items()}
    if len(found) < 2 or not all(found.values()):
        raise AnalysisError(
            "concepts are two or more names with words, such as "
            "'digit: bright {one|two} left; place: bright one {left|right}'; got " + repr(concepts)[:60]
        )
    return found


def _words(phrase: str) -> list[Word]:
    """The words that stand between braces, or the whole phrase."""
    phrase = phrase.strip()
    if not (place := PLACE.fullmatch(phrase)):
        if "{" in phrase or "}" in phrase:
            raise AnalysisError(f"a phrase has one pair of braces with words in it; got {phrase!r:.60}")
        return [Word(phrase, 0, len(phrase))] if phrase else []
    before, words, after = place.groups()
    return [
        Word(before + word + after, len(before), len(before) + len(word))
        for word in map(str.strip, words.split("|"))
        if word
    ]


def keys_of(model: DiffusionModel, word: Word) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """By layer, the keys of a word's tokens, [head, token, feature], and that of the token before all words
    [head, 0 or 1, feature]."""
    told = model.pipeline.components["tokenizer"](word.text, return_offsets_mapping=True)
    spans = told["offset_mapping"]
    own = [n for n, (begin, end) in enumerate(spans) if begin < min(end, word.end) and end > word.begin]
    if not own:
        raise AnalysisError(f"the tokenizer makes no token of {word.text[word.begin : word.end]!r:.40}")
    first = [0] if spans[0][0] == spans[0][1] else []
    with recorded(model, Pair(word.text, 0), num_inference_steps=1) as steps:
        now, record = steps.calls[0]
        row = now.rows(CONDITIONAL, len(record.valid))[0]
        keys = {layer: record.map(layer).k[row].float() for layer in record.layers}
    return {n: k[:, own] for n, k in keys.items()}, {n: k[:, first] for n, k in keys.items()}


def weights_of(queries: Tensor, first: Tensor, words: Sequence[Tensor], scale: float) -> Tensor:
    """Softmax over the first token and all tokens of some words, then means over queries and over each word's tokens.

    queries [head, query, feature] and keys [head, token, feature] give [word, head].
    """
    keys = torch.cat([first, *words], 1)
    keys = keys.repeat_interleave(len(queries) // len(keys), 0)
    weights = (queries.double() @ keys.double().mT * scale).softmax(-1).mean(1)
    places = [first.shape[1], *(word.shape[1] for word in words)]
    return torch.stack([part.mean(-1) for part in weights.split(places, -1)[1:]])
