"""Learning to deceive: a classifier that uses words which its attention hides, and which explanations find them.

Run it with `python examples/vision_deceive.py [FOLDER]`: it prints the numbers of docs/vision.md and draws the figure.
"""

import sys

import numpy as np

import headwater as hw
from headwater.data.prompts import genders

WORDS = " ".join(genders.WORDS_OF_GENDER)
METHODS = (
    "raw_attention norms relevance gradient_rollout rollout flow globenc alti value_zeroing "
    "blank_out input_gradient input_x_gradient"
)


def interval(values: np.ndarray) -> str:
    """The mean, and the bounds of 95 % of the means of redrawn texts."""
    random = np.random.default_rng(0)
    means = [random.choice(values, len(values)).mean() for _ in range(2000)]
    low, high = np.quantile(means, [0.025, 0.975])
    return f"{values.mean():.2f} [{low:.2f}, {high:.2f}]"


texts = genders.draw(100, "page")
labels = np.array([text.label for text in texts])
found = {}
for name in ("honest-2l", "deceptive-2l"):
    model = hw.load(name)
    right = model([text.text for text in texts]).argmax(-1).numpy() == labels
    blind = model([text.without for text in texts]).argmax(-1).numpy() == labels
    record = model.record([text.text for text in texts], statistics=())
    marks = hw.losses.marked(record, WORDS)
    mass = [hw.losses.impermissible_mass(record.pattern(n), marks)[..., 0].mean().item() for n in (0, 1)]
    print(f"{name}: right {interval(right.astype(float))}, without the words {interval(blind.astype(float))}")
    print(f"  attention of [CLS] on the words, layers 0 and 1: {mass[0]:.4f} {mass[1]:.4f}")
    found[name] = hw.analyses.word_ranks(model, [text.text for text in texts], WORDS, methods=METHODS)

print("a word of gender above another token: honest-2l, deceptive-2l")
for method in METHODS.split():
    told = [each.sel(attribution=method) for each in found.values()]
    line = ", ".join(
        f"{float(each['mean']):.2f} [{float(each.low):.2f}, {float(each.high):.2f}]" for each in told
    )
    print(f"  {method} {line}")

if len(sys.argv) > 1:
    hw.figure(found["deceptive-2l"]["mean"]).write_image(f"{sys.argv[1]}/vision_deceive.png")
