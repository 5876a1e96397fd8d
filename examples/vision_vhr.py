"""VHD and VHR on vlm-digits: which words depend on the picture, and what stronger seeing heads do to hallucination."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
from _digits_said import COUNT, WORDS, compare, example, plain, rng, there

import headwater as hw
from headwater import analyses
from headwater.analyses._measures.bootstrap import interval

model = hw.load("vlm-digits")


def vhr(given: list[hw.Example]) -> tuple[list[Any], Any]:
    found = [hw.recipes.head_reinforcement(model, each)[0].factors for each in given]
    return [hw.ScaleHeads(factors, rows=[n]) for n, factors in enumerate(found)], None


def random_heads(given: list[hw.Example]) -> tuple[list[Any], Any]:
    """As many heads of the same layers, at random."""
    found = [hw.recipes.head_reinforcement(model, each)[0].factors for each in given]
    layers = [[int(head[0]) for head in factors] for factors in found]
    drawn = [[f"{n}.{h}" for n in sorted({*of}) for h in rng.sample(range(8), of.count(n))] for of in layers]
    return [hw.ScaleHeads(dict.fromkeys(heads, 2.0), rows=[n]) for n, heads in enumerate(drawn)], None


prompts = [example(n, "what is there ?") for n in range(COUNT)]
found = analyses.token_divergence(model, prompts, length=16)
words = found.token_text.values
kinds = {
    "digits that are there": np.array([[w in there[n] for w in row] for n, row in enumerate(words)]),
    "digits that are not": np.array(
        [[w in WORDS and w not in there[n] for w in row] for n, row in enumerate(words)]
    ),
    "words of place": np.isin(words, ["top", "bottom", "left", "right"]),
}
print("words of the model's own captions: T-VHD, and log-probability with the picture less that without")
for kind, mine in kinds.items():
    cells, several = [], mine.sum() > 1  # one word has no interval
    for name in ("token_score", "gain"):
        mean, low, high = (float(part[0]) for part in interval(found[name].values[mine][:, None], 2000, 0))
        cells.append(f"{mean:.2f} [{low:.2f}, {high:.2f}]" if several else f"{mean:.2f}")
    print(f"  {kind}, {mine.sum()} {'words' if several else 'word'}: {', '.join(cells)}")
compare(model, {"plain": plain, "VHR": vhr, "random heads": random_heads})

if len(sys.argv) > 1:
    drawn = hw.figure(
        found.token_score.isel(batch=0), title="Which words of a caption depend on the picture?"
    )
    drawn.write_image(f"{sys.argv[1]}/vision_vhr.svg")
