"""VHR on llava-small, on scenes that disagree with its prior: heads that see, and random heads of the same layers."""

from __future__ import annotations

from typing import Any

import torch
from _scenes_said import compare, rng
from _ways import plain

import headwater as hw

model = hw.load("llava-small", dtype=torch.bfloat16)  # as in its training
chosen: dict[int, list[str]] = {}


def vhr(at_random: bool) -> Any:
    def way(given: list[hw.Example]) -> tuple[list[Any], Any]:
        edits = []
        for n, each in enumerate(given):
            if id(each) not in chosen:
                edit: Any = hw.recipes.head_reinforcement(model, each)[0]
                chosen[id(each)] = [str(head) for head in edit.factors]
            heads = chosen[id(each)]
            if at_random:
                of = [head.split(".")[0] for head in heads]
                heads = [f"{m}.{h}" for m in sorted({*of}) for h in rng.sample(range(9), of.count(m))]
            edits.append(hw.ScaleHeads(dict.fromkeys(heads, 2.0), rows=[n]))
        return edits, None

    return way


named = compare(model, {"plain": plain, "VHR": vhr(False), "random heads": vhr(True)})
print("captions with the missing partner: " + ", ".join(f"{way} {sum(each)}" for way, each in named.items()))
