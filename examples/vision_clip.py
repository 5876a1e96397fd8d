"""What heads and patches of clip-digits write about a picture: their captions, their maps, and what accuracy rests on.

Run it with `python examples/vision_clip.py [FOLDER]`: it prints the numbers of docs/vision.md and draws the figure.
"""

import random
import sys

import numpy as np

import headwater as hw
from headwater.data.pictures import canvases, captions

PLACES = [f"a digit {place}" for place in canvases.PLACES]
POOL = [caption.words for caption in captions.single()]
DIGITS = [captions.Claim(digit=n).words for n in range(10)]

model, rng = hw.load("clip-digits"), random.Random(0)
alone = [canvases.canvas(rng, count=1, held_out=True) for _ in range(300)]
place = [next(n for n, thing in enumerate(each.things) if thing) for each in alone]
shots = [each.picture() for each in alone]

things = [each.things[n] for each, n in zip(alone, place, strict=True)]
told = {"place": place, "digit": [t.digit for t in things], "brightness": [t.bright for t in things]}


def share(written: np.ndarray, labels: list) -> float:
    """Of the variance of what a head writes, [picture, d], the share between labels."""
    means = {label: written[np.array(labels) == label].mean(0) for label in labels}
    return np.array([means[label] for label in labels]).var(0).sum() / written.var(0).sum()


whole = hw.analyses.image_contributions(model, shots)
print(f"the parts add up to the embedding within 1e-5: {whole.closure < 1e-5}")
spans = hw.analyses.text_span(model, shots, texts=POOL, count=4)
for layer, head in sorted(np.ndindex(4, 4), key=lambda at: -spans.variance.values[at])[:5]:
    written = whole.contribution.values[:, layer, head]
    of = ", ".join(f"{name} {share(written, labels):.2f}" for name, labels in told.items())
    print(f"head {layer}.{head}: {spans.text.values[layer, head, 0]}; variance between {of}")
last = spans.isel(step=3).mean(("layer", "head"))
print(f"four texts explain {last.explained:.2f} of what a head writes, four random ones {last.random:.2f}")
for name, classes in (("place", PLACES), ("digit", DIGITS)):
    kept = hw.analyses.contribution_ablation(model, shots, classes, list(map(int, told[name])))
    for step in ("whole", "mlps", "attention ≤ 0", "attention ≤ 2", "instead attention ≥ 3"):
        at = kept.sel(step=step)
        print(f"{name}, {step}: {at.accuracy:.2f} [{at.low:.2f}, {at.high:.2f}]")

pairs = [canvases.canvas(rng, count=2, held_out=True) for _ in range(150)]
asked = [next(n for n, thing in enumerate(each.things) if thing) for each in pairs]
masks = np.stack([each.mask(n) for each, n in zip(pairs, asked, strict=True)])
shots, texts = [each.picture() for each in pairs], [PLACES[n] for n in asked]
scored = hw.analyses.segmentation(model, shots, texts, masks, against=PLACES).sel(score="miou")
for name in scored.attribution.values:
    at = scored.sel(attribution=name)
    print(f"mIoU of {name}: {at['mean']:.2f} [{at.low:.2f}, {at.high:.2f}]")

if len(sys.argv) > 1:
    heat = hw.analyses.text_heatmap(model, shots[0], texts=PLACES)
    hw.figure(heat, image=shots[0]).write_image(f"{sys.argv[1]}/vision_clip.svg")
