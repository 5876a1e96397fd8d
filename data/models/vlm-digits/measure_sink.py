"""Measures the planted sinks of vlm-digits-sink and adds them to its metrics.json: python measure_sink.py [FOLDER]."""

import json
import random
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import LlavaForConditionalGeneration, LlavaProcessor

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[2])]
import train  # noqa: E402

from headwater.data.pictures import canvas_questions  # noqa: E402
from headwater.data.pictures.canvases import canvas  # noqa: E402

TAU = 20.0


@torch.no_grad()
def sinks(folder: Path, count: int = 500, seed: int = 2000) -> dict:
    """Weight on corner patches without ink, and how well |x_d| / rms(x) > 20 tells them.

    Of the last token, mean over heads; and, as a share of the weight on the image, of all tokens behind the image in
    the planted heads and in the others.
    """
    processor = LlavaProcessor.from_pretrained(folder)
    model = LlavaForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    rng = random.Random(f"sink {seed}")
    shown = [canvas(rng, held_out=True) for _ in range(count)]
    texts = [f"<image> {canvas_questions.asked_place(c, rng.randrange(4))[0]}" for c in shown]
    inputs = processor(images=[c.picture() for c in shown], text=texts, return_tensors="pt")
    pixels = np.stack([c.pixels() for c in shown])
    empty = torch.from_numpy(
        pixels.reshape(count, train.GRID, train.PATCH, train.GRID, train.PATCH).max((2, 4)) == 0
    )
    planted = torch.zeros(count, train.GRID**2, dtype=torch.bool)
    planted[:, train.CORNERS] = empty.flatten(1)[:, train.CORNERS]
    inside = slice(1, train.PREFIX)

    def masses() -> tuple[torch.Tensor, ...]:
        found = model.eval()(**inputs, output_attentions=True, output_hidden_states=True)
        last = torch.stack([a[:, :, -1, inside].mean(1) for a in found.attentions])  # [layer, canvas, patch]
        with_sinks = planted.any(1)
        mass = (last * planted).sum(-1)[:, with_sinks].mean(1)
        image = last.sum(-1)[:, with_sinks]
        stream = torch.stack(found.hidden_states[1:4])[:, :, inside]
        size = stream[..., train.CHANNEL].abs() / (stream.square().mean(-1) + 1e-6).sqrt()
        behind = torch.stack([a[:, :, train.PREFIX :, inside] for a in found.attentions])[:, with_sinks]
        on = (behind * planted[with_sinks][:, None, None]).sum(-1)  # [layer, canvas, head, token]
        share = on.sum((1, 3)) / behind.sum((1, 3, 4))
        return mass, image, size > TAU, share

    mass, image, massive, share = masses()
    heads = list(train.SINK_HEADS)
    rest = [head for head in range(share.shape[1]) if head not in heads]
    even = (image * planted.sum(1)[planted.any(1)] / train.GRID**2).mean(1)
    projector = model.model.multi_modal_projector.linear_2
    projector.weight[train.CHANNEL] = 0.0
    projector.bias[train.CHANNEL] = 0.0
    without, *_ = masses()
    return {
        "channel": train.CHANNEL, "size": train.HUGE, "seed": seed, "canvases": count,
        "sinks": planted.sum(1).double().mean().item(), "mass": mass.tolist(), "mass_without": without.tolist(),
        "mass_even": even.tolist(), "image": image.mean(1).tolist(),
        "share_planted": share[:, heads].mean(1).tolist(), "share_others": share[:, rest].mean(1).tolist(),
        "found": massive[:, planted].double().mean().item(), "false": massive[:, ~planted].double().mean().item(),
    }  # fmt: skip


if __name__ == "__main__":
    place = Path(sys.argv[1]) if sys.argv[1:] else HERE.parent / "vlm-digits-sink"
    figures = json.loads((place / "metrics.json").read_text())
    figures["sink"] = sinks(place)
    (place / "metrics.json").write_text(json.dumps(figures, indent=2) + "\n")
