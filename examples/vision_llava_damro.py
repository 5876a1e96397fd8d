"""DAMRO on llava-small, on scenes that disagree with its prior: outlier patches of a real tower, and random ones."""

from __future__ import annotations

from typing import Any

import torch
from _scenes_said import compare, rng
from _ways import plain

import headwater as hw

KEPT = 4  # patches of 64 that the branch sees
model = hw.load("llava-small", dtype=torch.bfloat16)  # as in its training


def damro(at_random: bool) -> Any:
    def way(given: list[hw.Example]) -> tuple[list[Any], Any]:
        patches = [rng.sample(range(64), KEPT) for _ in given] if at_random else None
        return [], hw.recipes.damro(model, given, count=KEPT, alpha=1.0, patches=patches)

    return way


named = compare(model, {"plain": plain, "DAMRO": damro(False), "random patches": damro(True)})
print("captions with the missing partner: " + ", ".join(f"{way} {sum(each)}" for way, each in named.items()))
