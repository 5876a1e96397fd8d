"""See what you are told (VAR) on vlm-digits-sink: where the sinks are, what masking them does, and what VAR does."""

import random
import sys

import numpy as np

import headwater as hw
from headwater.data.pictures.canvas_questions import asked_place
from headwater.data.pictures.canvases import canvas

rng = random.Random("var")
shown = [(canvas(rng, held_out=True), rng.randrange(4)) for _ in range(150)]
asked = [(c, *asked_place(c, place)) for c, place in shown]
examples = [hw.Example(text=f"<image> {text}", image=c.picture()) for c, text, _ in asked]
answers = [answer for *_, answer in asked]


def told(values: np.ndarray) -> str:
    """The mean over pictures with its bootstrap interval."""
    means = np.random.default_rng(0).choice(values, (2000, len(values))).mean(1)
    return f"{np.mean(values):.3f} [{np.quantile(means, 0.025):.3f}, {np.quantile(means, 0.975):.3f}]"


model = hw.load("vlm-digits-sink")
tokens = model.to_tokens(examples)
print(f"{model.name}: massive dimensions {hw.recipes.massive_dimensions(model, tokens)}")
image = model.token_groups(tokens)["image"].numpy()[:, None]  # [picture, 1, token]
record = model.record(tokens, keep=("qk", "residual"))
massive = hw.analyses.find_sinks(record, rule="massive").sink.transpose("batch", "layer", "key").values
print(f"visual sinks of a picture: {(massive & image)[:, 2].sum(-1).mean():.2f}")


def seen(name: str) -> None:
    """Weight of the last token by layer, mean over heads, and right answers."""
    now = model.record(tokens, keep=("qk",))
    rows = np.stack([now.pattern(layer, queries=-1)[:, :, 0].mean(1) for layer in now.layers], 1)
    for of, keys in {"sinks": massive & image, "image": image}.items():
        print(f"{name}: weight on {of}, by layer", *(f"{x:.3f}" for x in (rows * keys).sum(-1).mean(0)))
    said = model.to_strings(model(tokens)[:, -1].argmax(-1).tolist())
    print(f"    right {told(np.array([a.strip() == b for a, b in zip(said, answers, strict=True)]))}")


seen("plain")
ways = {"VAR": hw.recipes.visual_redistribution(model, tokens, sinks_of="edited run")}
ways["all of it, all layers"] = [hw.RedistributeMassive([137], keep=0.0, most=1.0, least=0.0)]
for name, edits in ways.items():
    with model.edit(*edits):
        seen(name)
masks = {"rule": "massive", "among": "image", "keep": "0", "kind": "correct", "answer": answers}
study = hw.analyses.redistribution_study(model, examples, controls=3, **masks)
for treatment in ("sinks", "random_keys"):
    print(f"{treatment} masked: right changes by {told(study.effect.sel(treatment=treatment)[0, 0].values)}")
if sys.argv[1:]:
    figure = hw.figure(
        study, variable="mean", title="Right answers lost where tokens of the image are masked"
    )
    figure.write_image(f"{sys.argv[1]}/vision_var.svg")
