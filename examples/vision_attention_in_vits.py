"""What heads of a vision transformer are for: removed, left alone, how far they look, and their patterns.

`python examples/vision_attention_in_vits.py docs/vision` draws the figure.
"""

import sys

import numpy as np
import torch

import headwater as hw
from headwater.data.pictures.digits import WORDS, digits

torch.set_num_threads(1)
pictures, answers = map(torch.from_numpy, digits(held_out=True))
pixels, model, rng = 2 * pictures[:, None] - 1, hw.load("vit-digits"), np.random.default_rng(0)
found = hw.analyses.head_effects(model, model.to_tokens(pixels, label=answers), 1000, 64, True)
ours, theirs = slice(0, None, 2), slice(1, None, 2)  # heads are chosen on the first, and judged on the second


def share(values: np.ndarray) -> str:
    """A mean over pictures with the bounds that hold 95 % of the means of resampled pictures."""
    low, high = np.quantile(rng.choice(values, (2000, len(values))).mean(1), [0.025, 0.975])
    return f"{values.mean():.3f} [{low:.3f}, {high:.3f}]"


def read(heads: np.ndarray) -> np.ndarray:
    """Which digits of the second half are read without these heads."""
    with model.edit(hw.ScaleHeads(dict.fromkeys(map(str, heads), 0.0))):
        return (model(pixels[theirs]).argmax(-1) == answers[theirs]).double().numpy()


names = np.array([f"{layer}.{head}" for layer in model.layers for head in range(model.n_heads)])
print("digits read", share(read(names[:0])))
for measure in found.measure.values:
    values = found.per_example.sel(measure=measure).stack(name=("layer", "head")).values
    gone, alone = values[ours].mean(0)
    most, least, order = gone.argmax(), alone.argmin(), names[gone.argsort()]
    print(f"{measure} without {names[most]} falls by {share(values[theirs, 0, most])},", end=" ")
    print(f"with {names[least]} alone in its layer by {share(values[theirs, 1, least])}")
    print(f"  read without the 8 least {share(read(order[:8]))}, the 8 most {share(read(order[-8:]))}")
drawn = np.array([read(rng.choice(names, 8, replace=False)).mean() for _ in range(20)])
print(f"  read without 8 random heads {drawn.mean():.3f}, of 20 {drawn.min():.3f} to {drawn.max():.3f}")
worst = found.of_class.sel(measure="probability", way="removed").max(("layer", "head")).values
print("most that one head gives:", *(f"{w} {x:.2f}" for w, x in zip(WORDS, worst, strict=True)))
record = model.record(pixels)
far, atlas = hw.analyses.patch_distance(record, per_example=True), hw.analyses.pattern_atlas(record)
for n in model.layers:
    at = far.sel(layer=n).mean("head")
    rings, to, out = (x.values.mean(0).round(3) for x in (at.per_patch, at.to_prefix, at.from_prefix))
    print(f"layer {n} looks {share(at.mean_hops.values)} hops far, at a patch of each ring {rings},", end=" ")
    print(f"at CLS {to}, CLS at patches {out}; steady {atlas.steady.sel(layer=n).values.mean():.2f}")
held, sharp = atlas.explained.values.sum(), atlas.attrs
print(f"8 numbers hold {held:.2f} of the maps; kinds {sharp['silhouette']:.2f}", end=" ")
print(f"sharp, of permuted codes {sharp['silhouette_control']:.2f}")
if len(sys.argv) > 1:
    chart = hw.figure(found.effect.sel(measure="probability", way="removed"))
    chart.write_image(f"{sys.argv[1]}/vision_attention_in_vits.svg", width=520, height=320)
