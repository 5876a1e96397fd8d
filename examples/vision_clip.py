"""What heads and patches of clip-digits write about a picture: their captions, their maps, and what accuracy rests on.

python examples/vision_clip.py [FOLDER] prints the numbers of docs/vision.md and, with a folder, draws its figure there.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

import numpy as np

import headwater as hw
from headwater.data.pictures import canvases, captions

PLACES = [f"a digit {place}" for place in canvases.PLACES]
POOL = [caption.words for caption in captions.single()]
DIGITS = [captions.Caption((captions.Claim(digit=n),)).words for n in range(10)]

model, rng = hw.load("clip-digits"), random.Random(0)
alone = [canvases.canvas(rng, count=1, held_out=True) for _ in range(300)]
place = [next(n for n, thing in enumerate(each.things) if thing) for each in alone]
shots = [each.picture() for each in alone]

whole = hw.analyses.image_contributions(model, shots[:50])
print(f"the parts add up to the embedding within 1e-5: {whole.closure < 1e-5}")

spans = hw.analyses.text_span(model, shots, texts=POOL, count=4)
for layer, head in ((0, 2), (2, 3), (3, 0), (3, 1)):
    found = spans.sel(layer=layer, head=head)
    told = ", ".join(found.text.values[:2])
    print(f"head {layer}.{head}: {told}; explained {found.explained[1]:.2f}, random {found.random[1]:.2f}")
last = spans.isel(step=3).mean(("layer", "head"))
print(
    f"four texts of a head explain {last.explained:.2f} of what it writes, four random ones {last.random:.2f}"
)

truth = {"place": (PLACES, place), "digit": (DIGITS, [each.things[n].digit for each, n in zip(alone, place)])}
for name, (classes, labels) in truth.items():
    kept = hw.analyses.contribution_ablation(model, shots, classes, labels)
    for step in ("whole", "mlps", "class token", "attention ≤ 0", "attention ≤ 2", "instead attention ≥ 3"):
        at = kept.sel(step=step)
        print(f"{name}, {step}: {at.accuracy:.2f} [{at.low:.2f}, {at.high:.2f}]")

pairs = [canvases.canvas(rng, count=2, held_out=True) for _ in range(150)]
asked = [next(n for n, thing in enumerate(each.things) if thing) for each in pairs]
masks = np.stack([each.mask(n) for each, n in zip(pairs, asked)])
texts = [PLACES[n] for n in asked]
scored = hw.analyses.segmentation(model, [each.picture() for each in pairs], texts, masks, against=PLACES)
for name in scored.attribution.values:
    at = scored.sel(attribution=name, score="miou")
    print(f"mIoU of {name}: {at['mean']:.2f} [{at.low:.2f}, {at.high:.2f}]")

if len(sys.argv) > 1:
    picture = pairs[0].picture()
    heat = hw.analyses.text_heatmap(model, picture, texts=PLACES)
    drawn = hw.figure(heat, image=picture, title="Which patches write towards each place?")
    drawn.write_html(Path(sys.argv[1]) / "vision_clip.html", include_plotlyjs="cdn")
