"""PAINT on vlm-digits: weight on the image and right answers, in all heads, sensitive ones and random ones."""

import random
import sys

import numpy as np
import xarray as xr

import headwater as hw
from headwater.data.pictures.canvas_questions import asked_place
from headwater.data.pictures.canvases import canvas

model = hw.load("vlm-digits")
LAYERS = model.layers[1:]


def questions(seed: str, count: int) -> list[tuple[hw.Example, str]]:
    """Questions about the places of held-out digits, and their answers."""
    rng = random.Random(seed)
    shown = [(canvas(rng, held_out=True), rng.randrange(4)) for _ in range(count)]
    asked = [(c, *asked_place(c, place)) for c, place in shown]
    return [(hw.Example(text=f"<image> {text}", image=c.picture()), answer) for c, text, answer in asked]


def told(values: list[float]) -> str:
    """The mean over pictures with its bootstrap interval."""
    means = np.random.default_rng(0).choice(values, (2000, len(values))).mean(1)
    return f"{np.mean(values):.3f} [{np.quantile(means, 0.025):.3f}, {np.quantile(means, 0.975):.3f}]"


def seen(prompt: hw.Example, answer: str, heads: list | None) -> tuple[float, ...]:
    """Weight of the last token on the image by layer; the answer's probability; whether it is said."""
    edits = hw.recipes.visual_emphasis(model, prompt, heads=heads, layers=LAYERS) if heads else []
    with model.edit(*edits):
        record, shares = model.record(prompt, keep=("qk",)), model(prompt)[0, -1].softmax(-1)
    mass = [float(record.pattern(layer)[0, :, -1, 1:17].sum(-1).mean()) for layer in LAYERS]
    share = shares[model.tokenizer.convert_tokens_to_ids(answer)]
    return (*mass, float(share), float(share == shares.max()))


others = [prompt for prompt, _ in questions("heads", 40)]  # heads are chosen on other pictures
sensitive = hw.recipes.sensitive_heads(model, others, layers=LAYERS)
every = [hw.Head(layer, head) for layer in LAYERS for head in range(model.n_heads)]
draws = [random.Random(seed).sample(every, len(sensitive)) for seed in range(3)]
print("sensitive heads:", *sorted(map(str, sensitive)))
asked = questions("paint", 60)
ways = {"plain": [None], "all": [every], "sensitive": [sensitive], "random (3 draws)": draws}
for name, sets in ways.items():
    runs = np.array([[seen(*each, heads) for heads in sets] for each in asked]).mean(1)  # [picture, number]
    print(f"{name}: weight on the image {' '.join(f'{each:.3f}' for each in runs[:, :-2].mean(0))}")
    print(f"    probability of the answer {told(runs[:, -2])}, right {told(runs[:, -1])}")

if sys.argv[1:]:
    change = hw.recipes.visual_sensitivity(model, others).mean(0)
    drawn = xr.DataArray(change, dims=("layer", "head"), coords={"layer": model.layers}, name="change")
    figure = hw.figure(drawn, title="How much a head's output changes when the image is hidden")
    figure.write_image(f"{sys.argv[1]}/vision_paint.svg")
