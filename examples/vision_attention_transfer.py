"""Attention transfer: students on 400 digits, alone, with their teacher's maps copied, or learnt (distilled).

Control: the maps of another picture. `python examples/vision_attention_transfer.py docs/vision` draws the figure.
"""

import sys

import numpy as np
import plotly.graph_objects as go
import torch
from transformers import ViTConfig, ViTForImageClassification

import headwater as hw
from headwater.data.pictures.digits import digits

torch.set_num_threads(1)
DIGITS, STEPS, BATCH, RATE, SEEDS = 400, 120, 64, 2e-3, range(3)
KINDS = {"scratch": 0, "copied": 0, "distilled 1": 1, "distilled 10": 10, "control": 0}  # weight of the maps
teacher = hw.load("vit-digits")
(shown, named), (asked, answers) = (map(torch.from_numpy, digits(held_out)) for held_out in (False, True))
shown, asked = 2 * shown[:, None] - 1, 2 * asked[:, None] - 1


def run(student: hw.HookedModel, kind: str, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | float]:
    """What the student gives, and how far its maps are from its teacher's (nats)."""
    maps = teacher.record(x.roll(1, 0) if kind == "control" else x, statistics=())
    if kind in ("copied", "control"):
        with student.edit(hw.FreezeAttention(maps)):
            return student(x, grad=True), 0.0
    own = student.record(x, grad=True, statistics=())
    return own.output.logits, hw.attention_divergence(maps, own).mean() if KINDS[kind] else 0.0


def right(kind: str, seed: int) -> np.ndarray:
    """Which held-out digits a trained student reads; a distilled one has only its own maps then."""
    torch.manual_seed(seed)
    config = ViTConfig(**{**teacher.hf.config.to_dict(), "hidden_dropout_prob": 0.0})
    student, chosen = hw.load(ViTForImageClassification(config).eval()), torch.randperm(len(named))[:DIGITS]
    optimiser = torch.optim.AdamW(student.hf.parameters(), lr=RATE)
    for step in range(STEPS):
        batch = chosen[torch.randint(DIGITS, (BATCH,))]
        given, apart = run(student, kind, shown[batch])
        optimiser.param_groups[0]["lr"] = RATE * min(1, (step + 1) / 20) * (1 - step / STEPS)
        optimiser.zero_grad()
        (torch.nn.functional.cross_entropy(given, named[batch]) + KINDS[kind] * apart).backward()
        optimiser.step()
    return (run(student, kind, asked)[0].argmax(-1) == answers).numpy()


table = {kind: np.mean([right(kind, seed) for seed in SEEDS], 0) for kind in KINDS}
drawn = np.random.default_rng(0).integers(len(answers), size=(2000, len(answers)))
for kind, each in table.items():
    print(f"{kind:12}", end="")
    for word, values in ("reads", each), ("more than scratch", each - table["scratch"]):
        low, high = np.quantile(values[drawn].mean(1), [0.025, 0.975])
        print(f" {word} {values.mean():.3f} [{low:.3f}, {high:.3f}]", end="\n" * (word != "reads"))
if len(sys.argv) > 1:
    bars = go.Figure(go.Bar(x=list(KINDS), y=[table[k].mean() for k in KINDS]), {"template": "simple_white"})
    bars.write_image(f"{sys.argv[1]}/vision_attention_transfer.svg", width=520, height=320)
