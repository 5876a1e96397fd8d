"""Counts what llava-small gets right: answers, captions against what is there (CHAIR), presence (POPE)."""

from __future__ import annotations

import random
from collections.abc import Callable

from headwater.data.pictures import scenes

Ask = Callable[[scenes.Scene, list[str]], list[str]]  # the model's answers, each question asked by itself
CAPTION = "What is in the picture?"


def share(flags: list[bool]) -> dict[str, float | int]:
    """A share with Wilson's 95 % interval."""
    n, z = len(flags), 1.96
    p = sum(flags) / n
    middle, half = p + z * z / (2 * n), z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    low, high = ((middle + side * half) / (1 + z * z / n) for side in (-1, 1))
    return {"share": round(p, 4), "low": round(low, 4), "high": round(high, 4), "of": n}


def measure(ask: Ask, count: int, seed: str = "measured") -> dict[str, dict[str, float | int]]:
    """Answers on `count` ordinary scenes, and captions of as many that disagree with the prior; digits held out."""
    rng = random.Random(f"{seed} ordinary")
    right: dict[str, list[bool]] = {name: [] for name in ("presence", "place", "colour", "caption")}
    pope: dict[str, list[bool]] = {}
    for _ in range(count):
        scene = scenes.scene(rng, held_out=True)
        asked = [(name, *scenes.question(name, scene, rng)) for name in right]
        negative = [
            (how, f"Is there {scenes.said(scenes.absent(scene, rng, how))}?")
            for how in ("any", "likely", "near")
        ]
        there = f"Is there {scenes.said(rng.choice(sorted(scene.present)))}?"
        answers = ask(scene, [q for _, q, _ in asked] + [q for _, q in negative] + [there])
        for (name, _, wanted), found in zip(asked, answers, strict=False):
            same = set(scenes.mentioned(found)) == scene.present if name == "caption" else found == wanted
            right[name].append(same)
        for (how, _), found in zip(negative, answers[len(asked) :], strict=False):
            pope.setdefault(f"no to what is not there, {how}", []).append(found.startswith("No"))
        pope.setdefault("yes to what is there", []).append(answers[-1].startswith("Yes"))
    found = {name: share(flags) for name, flags in {**right, **pope}.items()}
    rng = random.Random(f"{seed} conflicting")
    for name, made in (("ordinary", scenes.scene), ("conflicting", scenes.conflicting)):
        drawn = [made(rng, held_out=True) for _ in range(count)]
        said = [scenes.mentioned(ask(scene, [CAPTION])[0]) for scene in drawn]
        false = [
            [thing not in scene.present for thing in words] for scene, words in zip(drawn, said, strict=True)
        ]
        found[f"captions with something that is not there, {name}"] = share(
            [any(f) for f in false]
        )  # CHAIR_S
        found[f"things in captions that are not there, {name}"] = share(
            [x for f in false for x in f] or [False]
        )
        missed = [
            thing not in words for scene, words in zip(drawn, said, strict=True) for thing in scene.present
        ]
        found[f"things that captions leave out, {name}"] = share(missed)
    partner = [
        any(scenes.PAIRS[thing] in words for thing in scene.present if thing in scenes.PAIRS)
        for scene, words in zip(drawn, said, strict=True)
    ]
    found["captions with the partner that is not there, conflicting"] = share(partner)
    return found
