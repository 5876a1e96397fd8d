"""Head relevance vectors: which concept each head of cross-attention answers to (HRV).

Park et al. 2024 (arXiv 2412.02237): while pictures are drawn, the patches are shown one word of every concept, and for
each head the concept whose word they look at most counts one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from headwater.analyses._catalogue.analysis import analysis
from headwater.analyses._catalogue.settings import Bounds, Draws, Seed
from headwater.analyses._measures.bootstrap import intervals
from headwater.analyses.vision._drawings import Pair, check_draws, pairs_of, part_of, recorded
from headwater.lens.diffusion.model import DiffusionModel
from headwater.lens.errors import AnalysisError
from headwater.lens.model import HookedModel
from headwater.lens.progress import progress
from headwater.lens.running.denoising import CONDITIONAL

Pictures = Annotated[int, "pictures for each prompt", Bounds(1)]


Concepts = str | Mapping[str, str | Sequence[str]]
PLACE = re.compile(r"([^{}]*)\{([^{}]+)\}([^{}]*)")


@dataclass(frozen=True)
class Word:
    """A word of a concept in its text, which is characters `begin` to `end` of it."""

    text: str
    begin: int
    end: int


@analysis
def head_relevance(
    model: HookedModel,
    examples: Any,
    concepts: Annotated[Concepts, "names with words: digit: bright {one|two} left; place: …"],
    pictures: Pictures = 1,
    draws: Draws = 1000,
    seed: Seed = 0,
) -> xr.Dataset:
    """`relevance` [concept, layer, head]: how often a head looks most at a concept's word, scaled to sum to the heads.

    For each picture, step and layer one word of each concept is drawn. With q the queries of the patches, of the branch
    with words, and k the keys of the first token and of the words' tokens: softmax(q·k / √d) over those tokens, mean
    over patches, mean over the tokens of a word. The concept with the largest weight counts one for the head.
    `share`, `low` and `high` [concept, layer, head]: counts by number of steps, and 95 % bootstrap over pictures;
    `per_example` [batch, concept, layer, head]; `weight`, the mean weight itself. `relevance` = share divided by its
    sum over heads, times the number of heads, so that it is 1 on average. `chance` is 1 / concepts.

    `concepts` are names with phrases; what stands between braces are the words, which are read at their place, as in
    {"digit": "bright {one|two} left"}; a phrase without braces is a word by itself. Only the places of a word's tokens
    are read, so the others are its context. AnalysisError if keys of words change from step to step.

    Question: Which heads of a text-to-image model look at which concept?
    Unit: relevance: times the mean head; share: share of steps.
    Source: Park et al. 2024, arXiv:2412.02237; checked against the authors' code, which reads each word by itself.
    Cost: a sampling run for each picture, whose queries are kept, and one denoiser call for each word.
    Not for: what a head does for the picture: see head_weakening; concepts whose words are never looked at.

    >>> import headwater as hw
    >>> model = hw.load("t2i-digits")
    >>> concepts = {"digit": "bright {one|two} left", "place": "bright one {left|right}"}
    >>> found = hw.analyses.head_relevance(model, "bright two left", concepts=concepts, draws=10)
    >>> found.relevance.shape, round(float(found.relevance.sel(concept="digit").mean()), 3)
    ((2, 4, 6), 1.0)
    """
    view = part_of(check_draws(model, "head_relevance"), "head_relevance", crosses=True)
    names = list(words := words_of(concepts))
    known = {word: keys_of(view, word) for word in {w: None for some in words.values() for w in some}}
    pairs = pairs_of(examples, pictures, seed)
    counts, weights = [], []
    for n, pair in enumerate(progress(pairs, desc="head relevance", unit="picture")):
        weight = _weights(view, pair, words, known, [seed, n])
        best = torch.nn.functional.one_hot(weight.argmax(1), len(names)).movedim(-1, 1)
        counts.append(best.double().mean(0).numpy())
        weights.append(weight.mean(0).numpy())
    table = np.stack(counts)
    share = table.mean(0)
    total = share.sum((1, 2), keepdims=True)
    relevance = np.divide(share, total, out=np.zeros_like(share), where=total > 0) * share[0].size
    dims = ("concept", "layer", "head")
    return xr.Dataset(
        {
            "relevance": (dims, relevance), **intervals(table, dims, draws, seed, ("share", "low", "high")),
            "weight": (dims, np.mean(weights, 0)), "per_example": (("batch", *dims), table),
        },
        coords={
            "concept": names, "layer": view.layers, "head": np.arange(view.n_heads), "batch": np.arange(len(pairs)),
        },
        attrs={"examples": len(pairs), "chance": 1 / len(names), "part": view.part_name},
    )  # fmt: skip


def _weights(
    model: DiffusionModel, pair: Pair, words: dict[str, list[Word]], known: dict[Word, Any], seed: list[int]
) -> torch.Tensor:
    """The weight of each concept's word while a picture is drawn, [step, concept, layer, head]."""
    found, before = [], None
    with recorded(model, pair) as steps:
        calls = [(now, record) for now, record in steps.calls if CONDITIONAL in now.branches]
        for step, (now, record) in enumerate(calls):
            row = now.rows(CONDITIONAL, len(record.valid))[0]
            layers = []
            for layer in record.layers:
                map = record.map(layer)
                rng = np.random.default_rng([*seed, step, layer])
                keys = [known[some[rng.integers(len(some))]] for some in words.values()]
                own = [each[layer] for each, _ in keys]
                layers.append(weights_of(map.q[row], keys[0][1][layer], own, map.rule.scale))
            keys = record.map(record.layers[0]).k[row]
            if before is not None and not torch.allclose(keys, before, atol=1e-4):
                raise AnalysisError(
                    f"the keys of words change from step to step in {model.name}; head_relevance reads models whose "
                    "words are encoded once"
                )
            before = keys
            found.append(torch.stack(layers, 1))
    return torch.stack(found)


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
