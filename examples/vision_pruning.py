"""Patches removed inside the run: which score keeps those that a ViT and a LLaVA-type model need, against chance.

Prints the accuracy on held-out digits by what is left behind which layer, and how far the state that reads has moved:
`python examples/vision_pruning.py docs/vision`, which also draws the scores over a digit.
"""

import random
import sys
from pathlib import Path

import torch

import headwater as hw
from headwater.data.pictures.canvas_questions import asked_place
from headwater.data.pictures.canvases import canvas
from headwater.data.pictures.digits import digits


def told(model, examples, layers, schedule="at_once", **more):
    """A line for each layer and number of patches left: by score the accuracy with its interval, then the drifts."""
    for layer in layers:
        found = hw.analyses.pruning_curve(
            model, examples, keep="0.5 0.25", layer=layer, schedule=schedule, batch_size=120, **more
        )
        for kept in found.kept.values:
            at, names = found.sel(kept=kept), list(found.score.values)
            right = ", ".join(
                f"{n} {float(at.accuracy.sel(score=n)):.3f} [{float(at.accuracy_low.sel(score=n)):.3f}, "
                f"{float(at.accuracy_high.sel(score=n)):.3f}]"
                for n in names
            )
            drift = " ".join(f"{float(at.drift.sel(score=n)):.3f}" for n in names)
            print(f"  {int(at.patches)} behind layer {layer}: {right}; drift {drift}")
    print(f"  16, all: {found.whole:.3f} of {found.examples}")


pictures, labels = digits(held_out=True)
pixels = torch.tensor(pictures)[:, None] * 2 - 1
vit = hw.load("vit-digits")
print("vit-digits, patches left of 16")
told(vit, vit.to_tokens(pixels, label=torch.tensor(labels)), (0, 1, 2))
print("the same, by FlowCut's schedule up to that layer")
told(vit, vit.to_tokens(pixels, label=torch.tensor(labels)), (2,), schedule="adaptive")

rng, asked = random.Random(0), []
for _ in range(240):
    shown, place = canvas(rng, count=4, held_out=True), rng.randrange(4)
    question, answer = asked_place(shown, place)
    asked.append((hw.Example(text=f"<image> {question}", image=shown.picture()), answer))
vlm, (texts, answers) = hw.load("vlm-digits"), zip(*asked, strict=True)
print("vlm-digits, image tokens of the language model left")
told(vlm, list(texts), (0, 1, 2), answers=list(answers))
print("vlm-digits, patches of its tower left")
told(vlm.part("vision"), list(texts), (0, 1), answers=list(answers))

if len(sys.argv) > 1:
    scores = hw.analyses.token_importance(vit.record(pixels[:1], keep="qkv")).sel(batch=0, layer=[0, 1, 2])
    hw.figure(scores, image=pixels[0]).write_image(Path(sys.argv[1], "vision_pruning.svg"))
