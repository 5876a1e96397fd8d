"""Needle tests: a sentence somewhere in a long text, and behind the text the question that it answers.

Two materials. "text": passages of the reference of Python (Python Software Foundation License, part of every Python),
and made-up sentences of Headwater about cities. "tokens": random tokens, for any vocabulary; the needle is a key of two
tokens and an answer, and the question is the key again.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pydoc_data.topics import topics
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from headwater.lens.errors import AnalysisError
from headwater.lens.model import HookedModel
from headwater.lens.models.signature import markers

Material = Literal["text", "tokens"]
KEY, ANSWER = 2, 8  # random tokens of a key and of its answer
LONGEST = 1024  # tokens of the longest test where no lengths are given
CITIES = (
    "Lisbon", "Oslo", "Vienna", "Prague", "Dublin", "Naples", "Geneva", "Athens", "Cairo", "Lima", "Boston", "Kyoto",
)  # fmt: skip
DEEDS = (
    "drink coffee on a high roof and watch the ships on the river",
    "rent an old boat and row to the green island before sunset",
    "buy warm bread at the market and eat it under the stone bridge",
    "walk along the city wall at night and count the yellow lamps",
    "sit in the botanical garden and draw the tall palm trees",
    "ride the wooden tram up the hill and listen to the church bells",
)


@dataclass(frozen=True, eq=False)
class Needle:
    """One test: `ids` [1, position], the spans of the needle, of its answer and of the question, all in `ids`.

    `words` are what the answer says, and `said` reads the same of tokens that a model wrote.
    """

    ids: Tensor
    needle: slice
    answer: slice
    question: slice
    tokenizer: Any = None

    def fits(self, model: HookedModel) -> None:
        """AnalysisError where the model does not read the test with its answer behind it."""
        length, more = self.ids.shape[1], self.answer.stop - self.answer.start
        if model.context and length + more > model.context:
            raise AnalysisError(
                f"{model.name} reads {model.context} tokens; a needle test of {length} with an answer of {more} is too "
                f"long, give lengths={model.context - more} or less"
            )

    def recall(self, written: Tensor) -> float:
        """ROUGE-1 recall of the answer's words, 0 to 1: the share of them that was written, each as often as it is."""
        wanted, found = (Counter(self._words(ids)) for ids in (self.ids[0, self.answer], written))
        return sum((wanted & found).values()) / sum(wanted.values())

    def _words(self, ids: Tensor) -> Iterable[Any]:
        if self.tokenizer is None:
            return ids.tolist()
        return re.findall(r"[a-z0-9]+", self.tokenizer.decode(ids.tolist()).lower())


def needles(
    model: HookedModel, lengths: Iterable[int], depths: Iterable[float], tests: int, material: Material, seed: int
) -> Iterator[tuple[int, float, Needle]]:  # fmt: skip
    """`tests` needles for every length (tokens of the whole prompt) and depth (0 is the beginning, 1 the end)."""
    drawn = random.Random(seed)
    for length in lengths:
        for _ in range(tests):
            make = (_of_text if material == "text" else _of_tokens)(model, length, drawn)
            for depth in depths:
                yield length, depth, make(depth)


def lengths_of(given: int | Sequence[int]) -> list[int]:
    """The lengths in order, each once. AnalysisError where there is none."""
    found = list(dict.fromkeys(int(each) for each in np.atleast_1d(np.asarray(given, dtype=int))))
    if not found:
        raise AnalysisError("needle tests need a length; got none")
    return found


def material_of(model: HookedModel) -> Material:
    """ "text" where the tokenizer can write the sentences, else "tokens"."""
    if model.tokenizer is None:
        return "tokens"
    sample = f"{_sentence(CITIES[0])} {DEEDS[0]}."
    plain = model.tokenizer.decode(_ids(model, sample), skip_special_tokens=True)
    return "text" if "".join(plain.split()) == "".join(sample.split()) else "tokens"


def fitting(model: HookedModel, material: Material) -> list[int]:
    """128 tokens and its doubles up to 1,024, as many as fit with the answer; else the longest that fits."""
    room = min((model.context or LONGEST + 64) - 32, LONGEST)
    doubles = [128 * 2**n for n in range(4) if 128 * 2**n <= room]
    return doubles or [(model.context or room) - ANSWER]


def _of_tokens(model: HookedModel, length: int, drawn: random.Random) -> Any:
    special = {*(getattr(model.tokenizer, "all_special_ids", None) or []), *markers(model.hf).values()}
    begin = getattr(model.tokenizer, "bos_token_id", None)
    begin = getattr(model.hf.config, "bos_token_id", None) if begin is None else begin
    start = [begin] if isinstance(begin, int) and 0 <= begin < model.vocab else []
    known = [token for token in range(model.vocab) if token not in {*special, *start}]
    hay_length = length - len(start) - 2 * KEY - ANSWER
    if len(known) <= KEY + ANSWER or hay_length < 0:
        raise AnalysisError(
            f"a needle of {KEY + ANSWER} random tokens needs prompts of {len(start) + 2 * KEY + ANSWER} tokens and a "
            f"vocabulary of {KEY + ANSWER + 1}; got lengths={length} and {len(known)} tokens"
        )
    needle = drawn.sample(known, KEY + ANSWER)
    others = [token for token in known if token not in needle]
    hay = drawn.choices(others, k=hay_length)

    def make(depth: float) -> Needle:
        place = round(depth * len(hay))
        ids = [*start, *hay[:place], *needle, *hay[place:], *needle[:KEY]]
        first = len(start) + place
        return Needle(
            torch.tensor([ids]),
            slice(first, first + len(needle)),
            slice(first + KEY, first + len(needle)),
            slice(len(ids) - KEY, len(ids)),
        )

    return make


def _of_text(model: HookedModel, length: int, drawn: random.Random) -> Any:
    tokenizer: Any = model.tokenizer
    if tokenizer is None:
        raise AnalysisError(f"{model.name} was loaded without a tokenizer; use material='tokens'")
    city, deed = drawn.choice(CITIES), drawn.choice(DEEDS)
    known, whole = _ids(model, f"\n{_sentence(city)}"), _ids(model, f"\n{_sentence(city)} {deed}.\n")
    ask = _ids(model, f"\nQuestion: What is the best thing to do in {city}?")
    asked = _ids(model, f"\nQuestion: What is the best thing to do in {city}?\nAnswer: {_sentence(city)}")
    end = _ids(model, f"\n{_sentence(city)} {deed}")
    if whole[: len(known)] != known or asked[: len(ask)] != ask or whole[: len(end)] != end:
        raise AnalysisError(
            f"the tokenizer of {model.name} does not part the needle from its answer; use material='tokens'"
        )
    start = _start(model)
    count = length - len(start) - len(whole) - len(asked)
    if count < 0:
        least = length - count
        raise AnalysisError(f"a needle and its question take {least} tokens; got lengths={length}")
    names = sorted(topics)
    drawn.shuffle(names)
    text = ""
    for name in names:
        text += topics[name] + "\n\n"
        if len(text) > 12 * count:
            break
    hay = _ids(model, text)[:count]
    pieces = {token: tokenizer.decode([token]) for token in set(hay)}
    breaks = [0, *(n + 1 for n, token in enumerate(hay) if pieces[token].rstrip(" ").endswith((".", "\n")))]

    def make(depth: float) -> Needle:
        wanted = depth * len(hay)
        place = len(hay) if depth == 1 else max(each for each in breaks if each <= wanted)
        ids = [*start, *hay[:place], *whole, *hay[place:], *asked]
        first, question = len(start) + place, len(start) + len(hay) + len(whole)
        return Needle(
            torch.tensor([ids]),
            slice(first, first + len(whole)),
            slice(first + len(known), first + len(end)),
            slice(question, question + len(ask)),
            tokenizer,
        )

    return make


def _sentence(city: str) -> str:
    return f"The best thing to do in {city} is to"


def _ids(model: HookedModel, text: str) -> list[int]:
    tokenizer: Any = model.tokenizer
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _start(model: HookedModel) -> list[int]:
    """What the tokenizer puts in front of a text."""
    plain, whole = _ids(model, "."), model.to_tokens(".").ids[0].tolist()
    return whole[: whole.index(plain[0])] if plain[0] in whole else []
