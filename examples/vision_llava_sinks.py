"""VAR on llava-small: which image tokens are massive, and what moving weight off them does to answers."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

import headwater as hw
from headwater.analyses._measures.bootstrap import interval
from headwater.data.pictures import scenes
from headwater.lens.records.sinks import massive

COUNT, BATCH = 60, 20
rng = random.Random("sinks")
model = hw.load("llava-small", dtype=torch.bfloat16)  # as in its training
shown = [scenes.scene(rng, held_out=True) for _ in range(COUNT)]
asked = [scenes.question("colour", each, rng) for each in shown]
texts = [scenes.CHAT.format(text) for text, _ in asked]
examples = [hw.Example(text=text, image=s.picture()) for text, s in zip(texts, shown, strict=True)]
parts = [examples[n : n + BATCH] for n in range(0, COUNT, BATCH)]
dimensions = hw.recipes.massive_dimensions(model, examples[0])
print(f"massive dimensions of the first token: {dimensions}")
tokens = model.to_tokens(parts[0])
image = model.token_groups(tokens)["image"]
record = model.record(tokens, statistics=(), keep=("residual",))
for layer in (2, 10, 19, 28):
    of = massive(record.residual(layer).float(), dimensions)[image]
    shares = ", ".join(f"above {tau} {float((of > tau).float().mean()):.3f}" for tau in (20, 15, 12))
    print(f"  layer {layer}: image tokens {shares}, the most {float(of.max()):.1f}; first token "
          f"{float(massive(record.residual(layer).float(), dimensions)[:, 0].mean()):.1f}")  # fmt: skip


def right(edits: list[Any]) -> np.ndarray:
    with model.edit(*edits):
        said = [text for some in parts for text in model.generate(some, 3)]
    return np.array(
        [text.rpartition("assistant\n")[2] == a for text, (_, a) in zip(said, asked, strict=True)]
    )


inner = model.layers[2:-1]
ways: dict[str, list[Any]] = {"plain": []}
ways["VAR"] = [hw.RedistributeMassive(dimensions, layers=inner)]
ways["all of it"] = [hw.RedistributeMassive(dimensions, 0.0, 20.0, 1.0, 0.0, layers=inner)]
plain = right([])
print(f"right colours of {COUNT}, and the change")
for name, edits in ways.items():
    now = plain if not edits else right(edits)
    mean, low, high = (float(part[0]) for part in interval((now * 1.0 - plain)[:, None], 2000, 0))
    print(f"  {name}: {now.mean():.3f}, {mean:+.3f} [{low:+.3f}, {high:+.3f}]", flush=True)
