"""llava-small where the picture disagrees with what usually stands together: plain, VHR, DAMRO and random controls."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import xarray as xr
from _scenes_said import compare, rng
from _ways import plain

import headwater as hw

KEPT = 4  # patches of 64 that DAMRO's branch sees
model = hw.load("llava-small")
chosen: dict[int, list[str]] = {}


def vhr(alpha: float, at_random: bool) -> Any:
    def way(given: list[hw.Example]) -> tuple[list[Any], Any]:
        edits = []
        for n, each in enumerate(given):
            if id(each) not in chosen:
                chosen[id(each)] = [
                    str(head) for head in hw.recipes.head_reinforcement(model, each)[0].factors
                ]
            heads = chosen[id(each)]
            if at_random:  # as many of the same layers
                of = [head.split(".")[0] for head in heads]
                heads = [f"{m}.{h}" for m in sorted({*of}) for h in rng.sample(range(9), of.count(m))]
            edits.append(hw.ScaleHeads(dict.fromkeys(heads, alpha), rows=[n]))
        return edits, None

    return way


def damro(at_random: bool) -> Any:
    def way(given: list[hw.Example]) -> tuple[list[Any], Any]:
        patches = [rng.sample(range(64), KEPT) for _ in given] if at_random else None
        return [], hw.recipes.damro(model, given, count=KEPT, alpha=1.0, patches=patches)

    return way


ways = {"plain": plain, "VHR, alpha 2": vhr(2.0, False), "random heads, alpha 2": vhr(2.0, True)}
ways |= {"VHR, alpha 1.2": vhr(1.2, False), "random heads, alpha 1.2": vhr(1.2, True)}
ways |= {"DAMRO, alpha 1": damro(False), "random patches, alpha 1": damro(True)}
named = compare(model, ways)
print("captions with the missing partner: " + ", ".join(f"{way} {sum(each)}" for way, each in named.items()))
if len(sys.argv) > 1:
    shares = xr.DataArray(np.array([*named.values()]).mean(1), {"way": [*named]}, ("way",), name="captions")
    hw.figure(shares, title="Captions with the missing partner").write_image(
        f"{sys.argv[1]}/vision_llava.svg"
    )
