"""Counts what llava-small answers right, and what it names that is not there (examples/_count_llava_small.py asks it).

Presence is asked as POPE does (Li et al. 2023): half about what is there, half about what is not. What is not there is
any thing (`random`), one that is frequent in training (`popular`), one with the colour or the kind of a thing that is
there (`near`), or, on scenes that disagree with the prior, the partner of a thing that is there (`adversarial`).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

from headwater.data.pictures import scenes

Asked = tuple[scenes.Scene, str]
Ask = Callable[[Sequence[Asked]], list[str]]  # the model's answers, each question alone behind its picture
CAPTION = "What is in the picture?"


def share(flags: Sequence[bool]) -> dict[str, Any]:
    """A share with Wilson's 95 % interval."""
    n, z = len(flags), 1.96
    p = sum(flags) / n
    middle, half = p + z * z / (2 * n), z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    low, high = (max(0.0, (middle + side * half) / (1 + z * z / n)) for side in (-1, 1))
    return {"share": round(p, 4), "low": round(low, 4), "high": round(high, 4), "of": n}


def pope(there: Sequence[str], absent: Sequence[str]) -> dict[str, Any]:
    """Answers about things that are there, and as many about things that are not."""
    yes, false = ([text.startswith("Yes") for text in each] for each in (there, absent))
    right = yes + [not each for each in false]
    f1 = 2 * sum(yes) / (sum(yes) + sum(false) + len(yes))
    return {
        "accuracy": share(right),
        "f1": round(f1, 4),
        "yes to what is there": share(yes),
        "yes to what is not": share(false),
        "yes_rate": round((sum(yes) + sum(false)) / len(right), 4),
    }


def captions(found: Sequence[str], shown: Sequence[scenes.Scene]) -> dict[str, Any]:
    """CHAIR (Rohrbach et al. 2018): captions, and things in them, that are not there; and what they leave out."""
    said = [scenes.mentioned(text) for text in found]
    false = [[thing not in scene.present for thing in each] for each, scene in zip(said, shown, strict=True)]
    missed = [thing not in each for each, scene in zip(said, shown, strict=True) for thing in scene.present]
    return {
        "chair_s": share([any(each) for each in false]),
        "chair_i": share([flag for each in false for flag in each] or [False]),
        "left_out": share(missed),
    }


def partners(scene: scenes.Scene) -> list[scenes.Thing]:
    """What the prior expects and the scene has not."""
    return [
        second
        for first, second in scenes.PAIRS.items()
        if first in scene.present and second not in scene.present
    ]


def is_there(ask: Ask, shown: Sequence[scenes.Scene], things: Sequence[scenes.Thing]) -> list[str]:
    asked = [(s, f"Is there {scenes.said(thing)}?") for s, thing in zip(shown, things, strict=True)]
    return ask(asked)


def ordinary(ask: Ask, count: int) -> dict[str, Any]:
    """Figures by kind of question on scenes that are drawn as those of the training, digits held out."""
    rng = random.Random("measured ordinary")
    shown = [scenes.scene(rng, held_out=True) for _ in range(count)]
    result: dict[str, Any] = {}
    for name in ("place", "colour"):
        asked = [scenes.question(name, scene, rng) for scene in shown]
        found = ask([(scene, text) for scene, (text, _) in zip(shown, asked, strict=True)])
        result[name] = share([text == wanted for text, (_, wanted) in zip(found, asked, strict=True)])
    found = ask([(scene, CAPTION) for scene in shown])
    exact = [{*scenes.mentioned(text)} == scene.present for text, scene in zip(found, shown, strict=True)]
    result["caption"] = share(exact)
    result["captions, ordinary"] = captions(found, shown)
    there = is_there(ask, shown, [rng.choice(sorted(scene.present)) for scene in shown])
    for how in ("random", "popular", "near"):
        absent = is_there(ask, shown, [scenes.absent(scene, rng, how) for scene in shown])
        result[f"pope, {how}"] = pope(there, absent)
    return result


def conflicting(ask: Ask, count: int) -> dict[str, Any]:
    """Presence and captions where the picture disagrees with the prior, and what captions name there falsely."""
    rng = random.Random("measured conflicting")
    shown = [scenes.conflicting(rng) for _ in range(count)]
    there = is_there(ask, shown, [rng.choice(sorted(scene.present)) for scene in shown])
    absent = is_there(ask, shown, [partners(scene)[0] for scene in shown])
    result = {"pope, adversarial": pope(there, absent)}
    found = ask([(scene, CAPTION) for scene in shown])
    result["captions, conflicting"] = captions(found, shown)
    named = [{*scenes.mentioned(text)} for text in found]
    false = [
        (thing in partners(scene), thing in each)
        for each, scene in zip(named, shown, strict=True)
        for thing in scenes.THINGS
        if thing not in scene.present
    ]
    for name, expected in (("the missing partner", True), ("any other absent thing", False)):
        result[f"named in a caption, {name}"] = share([said for of, said in false if of is expected])
    return result


SORTS = {"ordinary": ordinary, "conflicting": conflicting}
