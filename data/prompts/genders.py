"""Short texts about a man or a woman, in which only the words that say so tell for certain which.

The words of `WORDS_OF_GENDER` are the impermissible ones of a study of deceptive attention (Pruthi et al. 2020: a
classifier that uses words which its attention hides). Besides them a text names a hobby. It goes with the label in
`HINT` of the texts, so that the best possible classifier without the words of gender is right that often.
"""

import random
import zlib
from dataclasses import dataclass

CLASSES = ("man", "woman")
HINT = 0.65
PAIRS = (
    ("he", "she"), ("him", "her"), ("himself", "herself"), ("mr", "mrs"), ("father", "mother"), ("son", "daughter"),
    ("brother", "sister"), ("uncle", "aunt"), ("king", "queen"), ("actor", "actress"),
)  # fmt: skip
WORDS_OF_GENDER = tuple(word for pair in PAIRS for word in pair)
HOBBIES = (("chess", "fishing", "sailing", "boxing"), ("dancing", "painting", "riding", "singing"))


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NAMES = _words("adams baker clark davis evans fisher green hall irwin jones king-smith lewis moore nash owen")
TOWNS = _words("york leeds bath derby truro ripon wells oxford exeter durham")
JOBS = _words("teacher baker doctor clerk farmer pilot judge chemist writer tailor")
THINGS = _words("bread tea books flowers maps shoes apples letters clocks hats")
TIMES = _words("monday tuesday friday spring summer winter")
# Each sentence has one word of gender {g} or none; {n} is the name, the others are drawn from their list.
FIRST = (
    "{mr} {n} worked as a {job} in {town} .",
    "{n} was a {job} from {town} .",
    "in {town} lived the {job} {n} .",
    "the {job} {n} came to {town} in {time} .",
)
MIDDLE = (
    "every {time} {he} sold {thing} at the market .",
    "people gave {him} {thing} and {thing2} .",
    "the old {father} of a {job2} liked {hobby} .",
    "in {time} the {son} of the {job2} went to see the {thing} .",
    "the {brother} and the {job2} had {thing} for tea .",
    "an {uncle} of the {job2} bought {thing} .",
    "in the play {n} was a {king} with {thing} .",
    "once an {actor} , now a {job2} .",
    "nobody taught {himself} so much about {thing} .",
)
LAST = (
    "the hobby was {hobby} .",
    "best of all was {hobby} in {time} .",
    "on {time} there was {hobby} and {thing} .",
)


@dataclass(frozen=True)
class Text:
    """A text, its class (0 man, 1 woman), and whether each of its words is one of gender."""

    text: str
    label: int
    impermissible: tuple[bool, ...]

    @property
    def without(self) -> str:
        """The text without its words of gender."""
        return " ".join(w for w, gone in zip(self.text.split(), self.impermissible, strict=True) if not gone)


def vocabulary() -> list[str]:
    """Every word that a text may hold, in a fixed order."""
    fixed = {word for line in (*FIRST, *MIDDLE, *LAST) for word in line.split() if "{" not in word}
    lists = (WORDS_OF_GENDER, *HOBBIES, NAMES, TOWNS, JOBS, THINGS, TIMES)
    return sorted(fixed | {word for each in lists for word in each})


def split_of(name: str, town: str) -> str:
    """A person of a town is in the training texts or in the held-out ones, never in both."""
    return "held-out" if zlib.crc32(f"{name} {town}".encode()) % 5 == 0 else "train"


def draw(count: int, seed: int | str, split: str = "held-out") -> list[Text]:
    """`count` texts of a split, the classes in turn; the same for the same seed."""
    if split not in ("train", "held-out"):
        raise ValueError(f"split is train or held-out; got {split!r}")
    rng = random.Random(f"genders {split} {seed}")
    return [_text(rng, number % 2, split) for number in range(count)]


def _text(rng: random.Random, label: int, split: str) -> Text:
    while True:
        name, town = rng.choice(NAMES), rng.choice(TOWNS)
        if split_of(name, town) == split:
            break
    hobby = HOBBIES[label if rng.random() < HINT else 1 - label]
    slots = {
        **{one: pair[label] for pair in PAIRS for one in pair[:1]},
        "n": name, "town": town, "hobby": rng.choice(hobby), "time": rng.choice(TIMES),
        "job": rng.choice(JOBS), "job2": rng.choice(JOBS), "thing": rng.choice(THINGS), "thing2": rng.choice(THINGS),
    }  # fmt: skip
    sentences = [rng.choice(FIRST), *rng.sample(MIDDLE, rng.choice((1, 2))), rng.choice(LAST)]
    words = " ".join(sentences).format(**slots).split()
    return Text(" ".join(words), label, tuple(word in WORDS_OF_GENDER for word in words))
