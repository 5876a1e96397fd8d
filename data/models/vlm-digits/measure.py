"""Measures vlm-digits on fresh canvases, of digits that it was trained with and of digits held out."""

import random
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
from headwater.data.pictures import canvas_questions
from headwater.data.pictures.canvases import PLACES, Canvas, canvas


def drawn(count: int, seed: int, held_out: bool) -> list[Canvas]:
    rng = random.Random(f"measure {seed} {held_out}")
    return [canvas(rng, held_out=held_out) for _ in range(count)]


@torch.no_grad()
def answers(model, processor, asked: list[tuple[Canvas, str]], longest: int, rows: int = 250) -> list[str]:
    """What the model says by greedy decoding, up to `longest` words; the questions of one call have one length."""
    said = []
    for start in range(0, len(asked), rows):
        part = asked[start : start + rows]
        inputs = processor(
            images=[shown.picture() for shown, _ in part],
            text=[f"<image> {text}" for _, text in part],
            return_tensors="pt",
        )
        found = model.generate(**inputs, max_new_tokens=longest, do_sample=False)
        said += processor.tokenizer.batch_decode(
            found[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
    return said


def places(model, processor, count: int, seed: int, held_out: bool) -> np.ndarray:
    """Whether `what stands … ?` is answered right, bool [canvas, place]."""
    asked = [
        (c, *canvas_questions.asked_place(c, place))
        for c in drawn(count, seed, held_out)
        for place in range(4)
    ]
    said = answers(model, processor, [(c, text) for c, text, _ in asked], 1)
    right = [a == answer for a, (_, _, answer) in zip(said, asked, strict=True)]
    return np.array(right).reshape(-1, len(PLACES))


def others(model, processor, kind: str, count: int, seed: int, held_out: bool) -> np.ndarray:
    """Whether one question of a kind is answered right, every word of it, bool [canvas]."""
    rng = random.Random(f"asked {seed}")
    asked = [(c, *canvas_questions.question(kind, c, rng)) for c in drawn(count, seed, held_out)]
    said = answers(model, processor, [(c, text) for c, text, _ in asked], 1 if kind == "presence" else 16)
    return np.array([a == answer for a, (_, _, answer) in zip(said, asked, strict=True)])


def interval(right: np.ndarray, draws: int = 2000) -> dict[str, float]:
    """Share right with its 95 % bootstrap interval over canvases."""
    by_canvas = right.reshape(len(right), -1).mean(1)
    rng = np.random.default_rng(0)
    means = by_canvas[rng.integers(0, len(by_canvas), (draws, len(by_canvas)))].mean(1)
    low, high = np.quantile(means, (0.025, 0.975))
    return {
        "accuracy": float(by_canvas.mean()),
        "low": float(low),
        "high": float(high),
        "canvases": len(by_canvas),
    }


def everything(model, processor, draws: int, seed: int = 1000) -> dict:
    """All figures of metrics.json from one seed."""
    figures: dict = {"seed": seed}
    for split, held_out in (("seen_digits", False), ("held_out_digits", True)):
        right = places(model, processor, draws, seed, held_out)
        there = np.array([[thing is not None for thing in c.things] for c in drawn(draws, seed, held_out)])
        figures[split] = {
            "place": interval(right),
            "place_with_a_digit": float(right[there].mean()),
            "place_with_nothing": float(right[~there].mean()),
            "presence": interval(others(model, processor, "presence", draws, seed, held_out)),
            "caption": interval(others(model, processor, "caption", draws, seed, held_out)),
        }
    return figures
