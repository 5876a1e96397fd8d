"""What's in the image, on vlm-digits: which way a digit goes to the answer, where it is read, in how few patches."""

from __future__ import annotations

import random
import sys
from typing import Any

import headwater as hw
from headwater import analyses
from headwater.data.pictures.canvas_questions import asked_place
from headwater.data.pictures.canvases import PLACES, canvas

COUNT = 64
model = hw.load("vlm-digits")
rng = random.Random(20)
shown = [canvas(rng, count=4, held_out=True) for _ in range(COUNT)]
places = [rng.randrange(4) for _ in shown]
asked = [asked_place(each, place) for each, place in zip(shown, places, strict=True)]
prompts = [
    hw.Example(text=f"<image> {q}", image=each.picture()) for each, (q, _) in zip(shown, asked, strict=True)
]


def told(found: Any, name: str) -> str:
    value, low, high = (float(found[f"{name}{end}"]) for end in ("", "_low", "_high"))
    return f"{value:.2f} [{low:.2f}, {high:.2f}]"


found = analyses.attention_knockout(model, prompts, [a for _, a in asked], window=1, controls=1)
print(
    f"right answers on {COUNT} canvases: {told(found, 'plain_accuracy')}; with a route or random keys blocked"
)
for route in found.route.values:
    for window in found.window.values:
        cell = found.sel(route=route, window=window)
        print(f"  {route}, layer {window}: {told(cell, 'accuracy')}, random {told(cell, 'random_accuracy')}")

read = analyses.localised_reading(model, prompts, [PLACES[place] for place in places])
best = read.share.stack(at=("layer", "head")).idxmax().item()
print(f"share of the asked quarter, chance {float(read.chance):.2f}, mean over heads by layer")
for layer in read.layer.values:
    mean = read.sel(layer=layer).mean("head")
    print(f"  layer {layer}: {float(mean.share):.2f}, another example's quarter {float(mean.shuffled):.2f}")
cell = read.sel(layer=best[0], head=best[1])
print(f"  head {best[0]}.{best[1]}: {told(cell, 'share')}, most attended patch inside {told(cell, 'hit')}")

further = [asked_place(each, (place + 1) % 4) for each, place in zip(shown, places, strict=True)]
kept = analyses.image_compression(
    model, prompts, [q for q, _ in further], [a for _, a in further], keep="0, 2, 4, 8"
)
print(f"a second question about another quarter: {told(kept, 'plain_accuracy')} with the whole picture")
for size in kept.kept.values:
    cells = (f"{kind} {told(kept.sel(kind=kind, kept=size), 'accuracy')}" for kind in kept.kind.values)
    print(f"  {size} patches: {', '.join(cells)}")

if len(sys.argv) > 1:
    drawn = hw.figure(found.sel(route="image->answer"), variable="accuracy")
    drawn.write_image(f"{sys.argv[1]}/vision_inside.svg")
