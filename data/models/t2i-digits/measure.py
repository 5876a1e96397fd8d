"""Draws pictures and reads them: how many of the things that a prompt tells of stand there as told."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import PixArtTransformer2DModel
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer, CLIPTextModel, ViTForImageClassification

from headwater.data.pictures import drawings
from headwater.data.pictures.digits import digits

HERE = Path(__file__).resolve().parent
GUIDANCE, STEPS = 2.0, 10
Model = tuple[nn.Module, nn.Module, Any]  # denoiser, text encoder, tokenizer


@torch.no_grad()
def sample(
    denoiser: nn.Module, encoder: nn.Module, tokenizer: Any, texts: Sequence[str], seed: int,
    guidance: float = GUIDANCE, steps: int = STEPS,
) -> Tensor:  # fmt: skip
    """Euler steps from noise to a picture, with classifier-free guidance; [text, 8, 16] from 0 to 1."""
    given = tokenizer([*texts, *[""] * len(texts)], padding=True, return_tensors="pt")
    states = encoder(input_ids=given.input_ids).last_hidden_state
    x = torch.randn(
        len(texts), 1, drawings.ROWS, drawings.COLUMNS, generator=torch.Generator().manual_seed(seed)
    )
    times = torch.linspace(1, 0, steps + 1)
    for now, after in itertools.pairwise(times):
        told, untold = denoiser(
            torch.cat((x, x)), encoder_hidden_states=states, timestep=(1000 * now).expand(2 * len(texts)),
            encoder_attention_mask=given.attention_mask,
        ).sample.chunk(2)  # fmt: skip
        x = x + (after - now) * (untold + guidance * (told - untold))
    return ((x[:, 0] + 1) / 2).clamp(0, 1)


def accuracy(model: Model, reader: drawings.Reader, draws: int, seed: int, **sampling: Any) -> dict:
    """Shares of things that are right over `draws` prompts, with 95 % intervals (Wilson)."""
    rng = random.Random(f"prompts {seed}")
    told = [drawings.draw(rng) for _ in range(draws)]
    pictures = [
        sample(*model, [drawings.prompt(t) for t in told[n : n + 100]], seed + n, **sampling)
        for n in range(0, draws, 100)
    ]
    drawn = torch.cat(pictures).numpy()
    values = drawings.right(drawn, told, reader) | {"empty": drawings.empty(drawn, told)}
    return {name: share(each) for name, each in values.items() if len(each)}


def share(values: np.ndarray, z: float = 1.96) -> dict:
    n, p = len(values), float(values.mean())
    middle, width = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = ((middle + sign * width) / (1 + z * z / n) for sign in (-1, 1))
    return {"share": round(p, 4), "low": round(low, 4), "high": round(high, 4), "things": n}


def judge(folder: Path = HERE.parent / "vit-digits") -> drawings.Reader:
    """The shipped reader of digits."""
    net = ViTForImageClassification.from_pretrained(
        folder, use_safetensors=True, local_files_only=True
    ).eval()

    @torch.no_grad()
    def read(given: np.ndarray) -> np.ndarray:
        return net(pixel_values=2 * torch.from_numpy(given)[:, None].float() - 1).logits.argmax(-1).numpy()

    return read


def shipped(folder: Path = HERE) -> Model:
    """The model as it was written, in single precision."""
    denoiser = PixArtTransformer2DModel.from_pretrained(
        folder / "transformer", torch_dtype=torch.float32
    ).eval()
    encoder = CLIPTextModel.from_pretrained(
        folder / "text_encoder", use_safetensors=True, local_files_only=True, dtype=torch.float32
    )
    return (
        denoiser,
        encoder.eval(),
        AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True),
    )


def everything(folder: Path = HERE, draws: int = 400, seed: int = 1000) -> dict:
    """What stands in metrics.json: pictures drawn, and real ones held out, read by the same judge."""
    reader, model = judge(), shipped(folder)
    rng = random.Random(f"real {seed}")
    told = [drawings.draw(rng) for _ in range(draws)]
    real = np.stack([drawings.pixels(things, rng, held_out=True) for things in told])
    return {
        "judge": "vit-digits", "draws": draws, "seed": seed, "steps": STEPS, "guidance": GUIDANCE,
        "drawn": accuracy(model, reader, draws, seed),
        "drawn without guidance": accuracy(model, reader, draws, seed, guidance=1.0),
        "real held-out pictures": {n: share(x) for n, x in drawings.right(real, told, reader).items()},
        "chance": {"digit": 0.1, "brightness": 0.5},
    }  # fmt: skip


def small_reader(seed: int = 0, steps: int = 500) -> tuple[drawings.Reader, float]:
    """A small convolutional reader of digits, trained here, and its accuracy on the held-out ones."""
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(64 * 16, 10),
    )  # fmt: skip
    pictures, labels = (torch.from_numpy(each) for each in digits(False))
    optimiser = torch.optim.AdamW(net.parameters(), 2e-3, weight_decay=0.05)
    for _ in range(steps):
        chosen = torch.randint(len(labels), (128,))
        loss = cross_entropy(net(pictures[chosen, None]), labels[chosen])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    net.eval()

    @torch.no_grad()
    def read(given: np.ndarray) -> np.ndarray:
        return net(torch.from_numpy(given)[:, None].float()).argmax(1).numpy()

    pictures, labels = digits(True)
    return read, float((read(pictures / pictures.max((1, 2), keepdims=True)) == labels).mean())
