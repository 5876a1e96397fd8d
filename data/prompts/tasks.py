"""Seeded generators of the four tasks: indirect objects, coloured objects, capitals, repeated tokens."""

import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from headwater.data.prompts.words import (
    CAPITAL_TEMPLATES,
    CAPITALS,
    COLORS,
    EXTRA,
    INDIRECT_OBJECT_TEMPLATES,
    NAMES,
    OBJECTS,
    PLACES,
    SCENES,
    THINGS,
)

T = TypeVar("T")

SPLITS = ("train", "dev", "held-out")
COLOR_QUESTION = "What color is the {object} ? A : {color}"
# The same question with the answer nearer to the object: the two-hop steps on the way to the full question.
DIRECT_QUESTION = "{object} {color}"
SHORT_QUESTIONS = ("{object} : {color}", "the {object} is {color}", "What color is the {object} ? {color}")


@dataclass(frozen=True)
class Example:
    """One prompt with its answer; the corrupt prompt has as many tokens and another answer."""

    task: str
    template: str
    prompt: str
    answer: str
    wrong: tuple[str, ...]
    corrupt: str
    corrupt_answer: str | None


@dataclass(frozen=True)
class Document:
    """One training text as words, with the positions of the words that the text before determines."""

    words: tuple[str, ...]
    answers: tuple[int, ...]


def split_of(key: str) -> str:
    """The split a combination belongs to for good: one in ten is held out, one in ten is for development."""
    bucket = int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") % 10
    return {0: "held-out", 1: "dev"}.get(bucket, "train")


def _draw_until(make: Callable[[], T], key: Callable[[T], str], split: str) -> T:
    if split not in SPLITS:
        raise ValueError(f"split is one of {SPLITS}, not {split!r}")
    while True:
        value = make()
        if split_of(key(value)) == split:
            return value


def indirect_object(rng: random.Random, split: str = "held-out") -> Example:
    """Two names, one of them mentioned again; a held-out pair of names occurs in no training text."""
    pair = _draw_until(lambda: rng.sample(NAMES, 2), lambda p: "names " + " ".join(sorted(p)), split)
    template = rng.choice(INDIRECT_OBJECT_TEMPLATES)
    subject, other = pair if rng.random() < 0.5 else pair[::-1]
    fill = {"a": pair[0], "b": pair[1], "place": rng.choice(PLACES), "thing": rng.choice(THINGS)}
    order = "ABBA" if pair[0] == other else "BABA"
    return Example(
        "indirect_object",
        f"{order} {template}",
        template.format(s=subject, **fill),
        other,
        (subject,),
        template.format(s=other, **fill),
        subject,
    )


def capital(rng: random.Random, split: str = "held-out") -> Example:
    """A country's capital; a held-out pair of template and country occurs in no training text."""
    template, country = _draw_until(
        lambda: (rng.choice(CAPITAL_TEMPLATES), rng.choice(tuple(CAPITALS))),
        lambda c: "capital " + " ".join(c),
        split,
    )
    other = rng.choice([c for c in CAPITALS if c != country])
    name = rng.choice(NAMES)
    return Example(
        "capital",
        template,
        template.format(country=country, name=name),
        CAPITALS[country],
        (CAPITALS[other],),
        template.format(country=other, name=name),
        CAPITALS[other],
    )


def _scene(
    rng: random.Random, split: str, count: int = 3, avoid: tuple[str, ...] = ()
) -> tuple[str, str, list[tuple[str, str]]]:
    free = [thing for thing in OBJECTS if thing not in avoid]
    objects = _draw_until(lambda: rng.sample(free, count), lambda o: "objects " + " ".join(sorted(o)), split)
    pairs = list(zip(rng.sample(COLORS, count), objects, strict=True))
    items = [f"{'an' if color == 'orange' else 'a'} {color} {thing}" for color, thing in pairs]
    if count > 1:
        items[-1] = "and " + items[-1]
    opening = rng.choice(SCENES)
    return opening, f"Q : {opening} {' , '.join(items)} .", pairs


def colored_object(rng: random.Random, split: str = "held-out", shots: int | None = None) -> Example:
    """The colour of one of three objects; a held-out set of three objects is no training scene.

    With one shot, another scene of the same split with its question and answer stands before the question;
    left open, half of the examples have one.
    """
    shots = rng.randrange(2) if shots is None else shots
    before, used = "", ()
    for _ in range(shots):
        _, text, pairs = _scene(rng, split, avoid=used)
        # An object asked for later must not have had another colour before.
        used += tuple(thing for _, thing in pairs)
        color, thing = rng.choice(pairs)
        before += f"{text} {COLOR_QUESTION.format(object=thing, color=color)} "
    opening, text, pairs = _scene(rng, split, avoid=used)
    (color, thing), (other_color, other_thing), (third_color, _) = rng.sample(pairs, 3)
    ask = COLOR_QUESTION.removesuffix(" {color}")
    return Example(
        "colored_object",
        f"{shots}-shot {opening}",
        f"{before}{text} {ask.format(object=thing)}",
        color,
        (other_color, third_color),
        f"{before}{text} {ask.format(object=other_thing)}",
        other_color,
    )


def _random_words(rng: random.Random, split: str, count: int, words: Sequence[str] = ()) -> list[str]:
    return _draw_until(
        lambda: rng.sample(words or vocabulary(), count), lambda w: f"repeat {w[0]} {w[1]}", split
    )


def repeated_tokens(rng: random.Random, split: str = "held-out", length: int | None = None) -> Example:
    """Distinct random words, then the same up to one of them; a held-out start is in no training text."""
    words = _random_words(rng, split, length or rng.randint(5, 40))
    seen = rng.randint(1, len(words) - 1)
    unrelated = rng.sample([w for w in vocabulary() if w not in words], len(words))
    return Example(
        "repeated_tokens",
        f"length {len(words)}",
        " ".join(words + words[:seen]),
        words[seen],
        (rng.choice([w for w in words if w != words[seen]]),),
        # Without the first copy nothing tells the next word, so there is no answer to put in its place.
        " ".join(unrelated + words[:seen]),
        None,
    )


TASKS: dict[str, Callable[..., Example]] = {
    "indirect_object": indirect_object,
    "colored_object": colored_object,
    "capital": capital,
    "repeated_tokens": repeated_tokens,
}


def draw(task: str, count: int, seed: int, split: str = "held-out") -> list[Example]:
    """The examples of one task that a seed stands for."""
    rng = random.Random(f"{task} {seed}")
    return [TASKS[task](rng, split) for _ in range(count)]


_VOCABULARY: list[str] = []


def vocabulary() -> list[str]:
    """Every word a task can show, sorted, without the special tokens."""
    if not _VOCABULARY:
        templates = (
            *INDIRECT_OBJECT_TEMPLATES,
            *CAPITAL_TEMPLATES,
            *SCENES,
            COLOR_QUESTION,
            *SHORT_QUESTIONS,
        )
        fillers = (*NAMES, *PLACES, *THINGS, *COLORS, *OBJECTS, *CAPITALS, *CAPITALS.values())
        texts = (*templates, *fillers, *EXTRA, "Q : a an and")
        words = {word for text in texts for word in text.split() if not word.startswith("{")}
        _VOCABULARY.extend(sorted(words))
    return _VOCABULARY


def _colored_document(rng: random.Random, ease: float, direct: float) -> Iterator[tuple[str, bool]]:
    """Every object of a scene is asked for, so that one text holds several answers to learn from."""
    if direct and rng.random() < direct:
        _, text, pairs = _scene(rng, "train", rng.randint(3, 5))
        yield text, False
        for color, thing in rng.sample(pairs, len(pairs)):
            question = DIRECT_QUESTION if rng.random() < 0.8 else COLOR_QUESTION
            yield question.removesuffix(" {color}").format(object=thing), False
            yield color, True
        return
    used: tuple[str, ...] = ()
    easy = rng.random() < ease
    for _ in range(1 if easy else rng.choice((1, 1, 2))):
        _, text, pairs = _scene(rng, "train", rng.choice((2, 3) if easy else (3, 3, 3, 4)), avoid=used)
        used += tuple(thing for _, thing in pairs)
        yield text, False
        for color, thing in rng.sample(pairs, rng.randint(1, len(pairs))):
            question = rng.choice(SHORT_QUESTIONS) if rng.random() < ease else COLOR_QUESTION
            yield question.removesuffix(" {color}").format(object=thing), False
            yield color, True


def document(task: str, rng: random.Random, ease: float = 0.0, direct: float = 0.0) -> Document:
    """One training text from the training split; with `ease` 1 colours and repeats are easiest."""
    if task == "repeated_tokens":
        # Short repeats of few words first: the less there is to choose from, the sooner heads learn to copy.
        few = (*COLORS, *OBJECTS, *NAMES) if rng.random() < ease else ()
        size = (
            rng.randint(30, 62) if rng.random() < 0.15 * (1 - ease) else rng.randint(4, 30 - int(15 * ease))
        )
        words = _random_words(rng, "train", size, few)
        return Document(tuple(words + words), tuple(range(size + 1, 2 * size)))
    if task == "colored_object":
        parts = list(_colored_document(rng, ease, direct))
    else:
        parts = []
        for _ in range(rng.randint(1, 3) if task == "capital" else 1):
            example = TASKS[task](rng, "train")
            parts += [(example.prompt, False), (example.answer, True), (".", False)]
    words, answers = [], []
    for text, is_answer in parts:
        if is_answer:
            answers.append(len(words))
        words += text.split()
    return Document(tuple(words), tuple(answers))
