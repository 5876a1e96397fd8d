"""The tasks in natural spelling and from any word lists, for models that were not trained on them.

Each generator takes a random source and its pools of words, and gives an `Example` whose two prompts have as many
words; that they have as many tokens, and the answer one, is for the caller to see (`lens.prompts`). No word that
differs stands at the start of a text, where many tokenizers write it otherwise. Greater-than is the task of Hanna et
al. 2023 (arXiv 2305.00586), docstrings that of Heimersheim & Janiak 2023 (Alignment Forum); templates from memory.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from headwater.data.prompts import tasks
from headwater.data.prompts.tasks import Example
from headwater.data.prompts.words import (
    ARGUMENTS,
    CAPITAL_TEMPLATES,
    CAPITALS,
    COLORS,
    EVENTS,
    INDIRECT_OBJECT_TEMPLATES,
    NAMES,
    OBJECTS,
    PLACES,
    SCENES,
    THINGS,
)

Pools = Mapping[str, Sequence[str]]
CENTURIES = tuple(str(n) for n in range(11, 18))
FIRST_YEAR = "01"  # the corrupt start: every year of the century is larger
YEARS = tuple(f"{n:02}" for n in range(100))
YEAR_PROMPT = "The {event} lasted from the year {century}{start} to the year {century}"
LONGEST_REPEAT = 20


@dataclass(frozen=True)
class YearExample(Example):
    """Greater-than: any end above `start` is right, so there is a set of answers; `answer` is one of them.

    `ends` are the last two digits of years, or the first of these, the decade, for tokenizers of single digits.
    """

    century: str = ""
    start: str = ""
    ends: tuple[str, ...] = ()

    @property
    def sides(self) -> tuple[list[str], list[str]]:
        """The ends that are right and those that are wrong."""
        return sides(self.start, self.ends)


def natural(text: str) -> str:
    """Without the spaces in front of punctuation that one token per word needs."""
    return re.sub(r" ([,.?:])", r"\1", text)


def indirect_object(rng: random.Random, pools: Pools) -> Example:
    """Two names, one of them said again: the other is given something. Corrupt: the other is said again."""
    templates = [t for t in INDIRECT_OBJECT_TEMPLATES if not t.startswith("{a}")]
    template = rng.choice(templates)
    first, second = rng.sample(pools["names"], 2)
    other, subject = (first, second) if rng.random() < 0.5 else (second, first)
    fill = {"a": first, "b": second, "place": rng.choice(PLACES), "thing": rng.choice(THINGS)}
    order = "ABBA" if first == other else "BABA"
    clean, corrupt = (natural(template.format(s=said, **fill)) for said in (subject, other))
    return Example("indirect_object", f"{order} {template}", clean, other, (subject,), corrupt, subject)


def colored_object(rng: random.Random, pools: Pools) -> Example:
    """The colour of one of three objects, half of the time after another scene. Corrupt: another object is asked."""
    objects = rng.sample(pools["objects"], 6)
    shots = rng.randrange(2)
    before = ""
    ask = tasks.COLOR_QUESTION.removesuffix(" {color}")
    if shots:
        scene, pairs = _scene(rng, pools["colors"], objects[3:])
        color, thing = rng.choice(pairs)
        before = f"{scene} {ask.format(object=thing)} {color} "
    scene, pairs = _scene(rng, pools["colors"], objects[:3])
    (color, thing), (other_color, other), (third, _) = rng.sample(pairs, 3)
    clean, corrupt = (natural(f"{before}{scene} {ask.format(object=name)}") for name in (thing, other))
    return Example(
        "colored_object", f"{shots}-shot", clean, color, (other_color, third), corrupt, other_color
    )


def colored_conflict(rng: random.Random, pools: Pools) -> Example:
    """The colour an object has now, after a scene in which it had another. Corrupt: the scenes' colours swapped.

    A condition in which models err that know coloured objects well; the wrong answer is the object's earlier colour.
    """
    objects, colors = rng.sample(pools["objects"], 3), rng.sample(pools["colors"], 6)
    later = rng.sample(objects, 3)
    asked, asked_before = rng.sample(objects, 2)
    openings = rng.choices(SCENES, k=2)

    def text(first: Sequence[str], second: Sequence[str]) -> tuple[str, str, str]:
        old, new = dict(zip(objects, first, strict=True)), dict(zip(objects, second, strict=True))
        scenes = (_items(openings[0], old, objects), _items(openings[1], new, later))
        ask = tasks.COLOR_QUESTION.removesuffix(" {color}")
        before = f"{scenes[0]} {ask.format(object=asked_before)} {old[asked_before]}"
        return natural(f"{before} {scenes[1]} {ask.format(object=asked)}"), new[asked], old[asked]

    clean, answer, wrong = text(colors[:3], colors[3:])
    corrupt, _, _ = text(colors[3:], colors[:3])
    return Example("colored_conflict", "1-shot", clean, answer, (wrong,), corrupt, wrong)


def _items(opening: str, colors: Mapping[str, str], objects: Sequence[str]) -> str:
    items = [f"{'an' if colors[o][0] in 'aeiou' else 'a'} {colors[o]} {o}" for o in objects]
    items[-1] = "and " + items[-1]
    return f"Q : {opening} {' , '.join(items)} ."


def _scene(
    rng: random.Random, colors: Sequence[str], objects: Sequence[str]
) -> tuple[str, list[tuple[str, str]]]:
    pairs = list(zip(rng.sample(colors, len(objects)), objects, strict=True))
    return _items(rng.choice(SCENES), {thing: color for color, thing in pairs}, objects), pairs


def capital(rng: random.Random, pools: Pools) -> Example:
    """A country's capital, of pools of countries and, in the same order, capitals. Corrupt: another country."""
    known = dict(zip(pools["countries"], pools["capitals"], strict=True))
    template = rng.choice([t for t in CAPITAL_TEMPLATES if not t.startswith("{country}")])
    country, other = rng.sample(list(known), 2)
    name = rng.choice(NAMES)
    clean, corrupt = (natural(template.format(country=c, name=name)) for c in (country, other))
    return Example("capital", template, clean, known[country], (known[other],), corrupt, known[other])


def repeated_tokens(rng: random.Random, pools: Pools) -> Example:
    """A word, then others that are repeated up to one of them. Corrupt: unrelated words in the first copy."""
    words = pools["words"]
    length = rng.randint(3, min(LONGEST_REPEAT, (len(words) - 1) // 2))
    picked = rng.sample(words, 2 * length + 1)
    lead, told, unrelated = picked[0], picked[1 : length + 1], picked[length + 1 :]
    seen = rng.randint(1, length - 1)
    clean, corrupt = (" ".join([lead, *first, *told[:seen]]) for first in (told, unrelated))
    wrong = rng.choice([word for word in told if word != told[seen]])
    return Example("repeated_tokens", f"length {length}", clean, told[seen], (wrong,), corrupt, None)


def greater_than(rng: random.Random, pools: Pools, digits: int = 2) -> YearExample:
    """A war that ends in a later year than it began; pools of words, and of years as "1732". Corrupt: begun in 01.

    With `digits=1` the answer is the decade alone: from 1732 to 17, right are 4 to 9 and wrong are 0 to 2. The decade
    of the start itself is neither, as it holds years on both sides.
    """
    by_century: dict[str, list[str]] = {}
    for year in pools["years"]:
        by_century.setdefault(year[:2], []).append(year[2:])
    century = rng.choice(sorted(c for c, years in by_century.items() if starts(years, digits)))
    start = rng.choice(starts(by_century[century], digits))
    ends = sorted({year[:digits] for year in by_century[century]})
    event = rng.choice(pools["words"])
    clean, corrupt = (YEAR_PROMPT.format(event=event, century=century, start=s) for s in (start, FIRST_YEAR))
    right, wrong = sides(start, ends)
    answer = rng.choice(right)
    other = start if digits == 2 else rng.choice(wrong)
    form = century if digits == 2 else f"{century}, decade"
    return YearExample(
        "greater_than", form, clean, answer, (other,), corrupt, None, century, start, tuple(ends)
    )


def starts(years: Sequence[str], digits: int) -> list[str]:
    """Years of a century from which a war may begin: after 01, with a right and a wrong end."""
    ends = {year[:digits] for year in years}
    fit = [year for year in sorted(years) if year > FIRST_YEAR and all(sides(year, ends))]
    return fit if FIRST_YEAR in years else []


def sides(start: str, ends: Iterable[str]) -> tuple[list[str], list[str]]:
    """The ends of which every year is above `start`, and those of which none is."""
    right = [end for end in sorted(ends) if end.ljust(2, "0") > start]
    return right, [end for end in sorted(ends) if end.ljust(2, "9") <= start]


def docstring(rng: random.Random, pools: Pools) -> Example:
    """The next argument that a docstring describes, of a method of four. Corrupt: other arguments throughout."""
    picked = rng.sample(pools["words"], 8)
    name, *said = rng.sample(THINGS + PLACES, 7)
    clean, corrupt = (_method(name, said, arguments) for arguments in (picked[:4], picked[4:]))
    first, second, answer, last = picked[:4]
    return Example("docstring", "", clean, answer, (last, first, second), corrupt, picked[6])


def _method(name: str, said: Sequence[str], arguments: Sequence[str]) -> str:
    lines = [
        f"def {name}(self, {', '.join(arguments)}):",
        f'    """{said[0]} {said[1]}',
        "",
        f"    :param {arguments[0]}: {said[2]} {said[3]}",
        f"    :param {arguments[1]}: {said[4]} {said[5]}",
        "    :param",
    ]
    return "\n".join(lines)


@dataclass(frozen=True)
class PromptText:
    """A generator, its own pools of words, and how many of each it needs at least.

    `digits` is how many digits of a year its answers hold.
    """

    make: Callable[[random.Random, Pools], Example]
    pools: Mapping[str, Sequence[str]]
    least: Mapping[str, int]
    digits: int = 2

    def by_decade(self) -> PromptText:
        """Greater-than for tokenizers of single digits."""
        return replace(self, make=partial(greater_than, digits=1), digits=1)


def _plain_words() -> list[str]:
    return [word for word in tasks.vocabulary() if word.isalpha()]


def texts() -> dict[str, PromptText]:
    """Every set by name."""
    years = [century + year for century in CENTURIES for year in YEARS]
    return {
        "indirect_object": PromptText(indirect_object, {"names": NAMES}, {"names": 2}),
        "colored_object": PromptText(
            colored_object, {"colors": COLORS, "objects": OBJECTS}, {"colors": 3, "objects": 6}
        ),
        "colored_conflict": PromptText(
            colored_conflict, {"colors": COLORS, "objects": OBJECTS}, {"colors": 6, "objects": 3}
        ),
        "capital": PromptText(
            capital,
            {"countries": tuple(CAPITALS), "capitals": tuple(CAPITALS.values())},
            {"countries": 2, "capitals": 2},
        ),
        "repeated_tokens": PromptText(repeated_tokens, {"words": _plain_words()}, {"words": 7}),
        "greater_than": PromptText(greater_than, {"words": EVENTS, "years": years}, {"words": 1, "years": 3}),
        "docstring": PromptText(docstring, {"words": ARGUMENTS}, {"words": 8}),
    }
