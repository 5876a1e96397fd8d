"""What clip-digits reads on canvases of held-out digits: python measure.py adds it to metrics.json."""

import argparse
import json
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoProcessor, CLIPModel, CLIPProcessor

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[2])]

from headwater.data.pictures.canvases import PLACES, canvas  # noqa: E402
from headwater.data.pictures.captions import Caption, Claim  # noqa: E402

BATCH = 250


def choices() -> dict[str, list[str]]:
    """The captions that are compared with a canvas of one digit, by what they tell."""
    return {
        "digit": [Caption((Claim(digit=n),)).words for n in range(10)],
        "place": [Caption((Claim(place=n),)).words for n in range(len(PLACES))],
        "brightness": [Caption((Claim(bright=n),)).words for n in range(2)],
    }


def embedded(
    model: Any,
    processor: CLIPProcessor,
    *,
    pictures: list | None = None,
    texts: list[str] | None = None,
) -> torch.Tensor:
    """Embeddings of pictures or of texts, of length 1."""
    if pictures is not None:
        given = processor.image_processor(pictures, return_tensors="pt")
        found = model.get_image_features(**given).pooler_output
    else:
        given = processor.tokenizer(texts, padding=True, return_tensors="pt", return_token_type_ids=False)
        found = model.get_text_features(**given).pooler_output
    return torch.nn.functional.normalize(found, dim=-1)


@torch.no_grad()
def right(model: CLIPModel, processor: CLIPProcessor, count: int, seed: int = 1) -> dict[str, np.ndarray]:
    """For each question whether the nearest caption holds, bool [canvas]: of one digit, and of one to four."""
    rng = random.Random(f"measure {seed}")
    alone = [canvas(rng, count=1, held_out=True) for _ in range(count)]
    several = [canvas(rng, held_out=True) for _ in range(count)]

    def read(found: list) -> torch.Tensor:
        shots = [c.picture() for c in found]
        return torch.cat(
            [embedded(model, processor, pictures=shots[n : n + BATCH]) for n in range(0, count, BATCH)]
        )

    one, many = read(alone), read(several)
    place = [next(n for n, thing in enumerate(c.things) if thing) for c in alone]
    things: list[Any] = [c.things[n] for c, n in zip(alone, place, strict=True)]
    truth = {
        "digit": [thing.digit for thing in things],
        "place": place,
        "brightness": [int(thing.bright) for thing in things],
    }
    found = {}
    for name, captions in choices().items():
        nearest = (one @ embedded(model, processor, texts=captions).T).argmax(-1)
        found[name] = nearest.numpy() == np.array(truth[name])
    numbers = [Caption(count=n).words for n in range(1, 5)]
    nearest = (many @ embedded(model, processor, texts=numbers).T).argmax(-1)
    found["number of digits"] = nearest.numpy() + 1 == np.array([sum(map(bool, c.things)) for c in several])
    asked = [rng.choice([n for n, thing in enumerate(c.things) if thing]) for c in several]
    for name in ("digit", "brightness"):  # of the digit at one place, among others
        field = {"digit": "digit", "brightness": "bright"}[name]
        values = range(10 if name == "digit" else 2)
        texts = [Caption((Claim(place=p, **{field: v}),)).words for p in range(len(PLACES)) for v in values]
        table = embedded(model, processor, texts=texts).reshape(len(PLACES), len(values), -1)
        nearest = torch.einsum("nd,nvd->nv", many, table[asked]).argmax(-1).numpy()
        there = np.array([int(getattr(c.things[p], field)) for c, p in zip(several, asked, strict=True)])
        found[f"{name} at a place"] = nearest == there
    return found


def interval(held: np.ndarray, draws: int = 2000) -> list[float]:
    """The bounds that hold 95 % of the shares of resampled canvases."""
    picks = np.random.default_rng(0).integers(len(held), size=(draws, len(held)))
    return [round(float(x), 4) for x in np.quantile(held[picks].mean(1), [0.025, 0.975])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--model", type=Path, default=HERE)
    args = parser.parse_args()
    model = CLIPModel.from_pretrained(args.model, dtype=torch.float32, use_safetensors=True).eval()
    processor = AutoProcessor.from_pretrained(args.model)
    chance = {"digit": 0.1, "place": 0.25, "brightness": 0.5, "number of digits": 0.25}
    chance |= {"digit at a place": 0.1, "brightness at a place": 0.5}
    figures = {
        name: {"right": round(float(held.mean()), 4), "interval": interval(held), "chance": chance[name]}
        for name, held in right(model, processor, args.count).items()
    }
    known = json.loads((args.model / "metrics.json").read_text())
    known |= {"zero_shot": figures, "canvases": args.count, "seed": 1}
    (args.model / "metrics.json").write_text(json.dumps(known, indent=1) + "\n")
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
