"""Trains vit-digits: python train.py; killed and started again, it goes on from its last checkpoint."""

import argparse
import json
import math
import os
import sys
from pathlib import Path

import torch
from torch.nn.functional import affine_grid, cross_entropy, grid_sample
from tqdm import tqdm
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[2])]

from headwater.data.pictures.digits import WORDS, digits  # noqa: E402

SIDE, PATCH, MEAN, STD = 8, 2, 0.5, 0.5
AVERAGED = 0.998  # what a step leaves of the average of the weights, which is what is shipped


def build_model() -> ViTForImageClassification:
    """A ViT of four layers and six heads with fresh weights; 16 patches of 2×2 pixels and the class token."""
    return ViTForImageClassification(
        ViTConfig(
            hidden_size=48,
            num_hidden_layers=4,
            num_attention_heads=6,
            intermediate_size=96,
            image_size=SIDE,
            patch_size=PATCH,
            num_channels=1,
            hidden_dropout_prob=0.1,
            initializer_range=0.1,
            id2label=dict(enumerate(WORDS)),
            label2id={word: i for i, word in enumerate(WORDS)},
        )
    )


def build_processor() -> ViTImageProcessor:
    """Greys of any size become 8×8 pixels from -1 to 1."""
    return ViTImageProcessor(size={"height": SIDE, "width": SIDE}, image_mean=[MEAN], image_std=[STD])


def varied(pictures: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """The same digits turned by up to 15°, moved by up to a pixel, up to 15 % larger or smaller, and noisy."""
    turn, size, across, down = (torch.rand(4, len(pictures), generator=generator) * 2 - 1).unbind()
    turn, size = turn * math.radians(15), 1 + 0.15 * size
    cos, sin, step = turn.cos() * size, turn.sin() * size, 2 / SIDE
    moves = torch.stack((cos, -sin, across * step, sin, cos, down * step), 1).view(-1, 2, 3)
    grid = affine_grid(moves, list(pictures.shape), align_corners=False)
    noise = 0.05 * torch.randn(pictures.shape, generator=generator)
    return (grid_sample(pictures, grid, align_corners=False) + noise).clamp(0, 1)


def pixels(pictures: torch.Tensor) -> torch.Tensor:
    return (pictures - MEAN) / STD


def save_checkpoint(path: Path, state: dict) -> None:
    """A kill in the middle of writing leaves the previous checkpoint whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, path.with_suffix(".part"))
    os.replace(path.with_suffix(".part"), path)


@torch.no_grad()
def measure(model: ViTForImageClassification) -> dict:
    """Accuracy on the held-out digits with Wilson's 95 % interval, and per digit."""
    pictures, labels = (torch.from_numpy(x) for x in digits(held_out=True))
    right = (model(pixels(pictures[:, None])).logits.argmax(-1) == labels).double()
    n, share, z = len(right), float(right.mean()), 1.96
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    each = {word: round(float(right[labels == i].mean()), 4) for i, word in enumerate(WORDS)}
    return {
        "held_out": {
            "examples": n,
            "accuracy": round(share, 4),
            "interval_95": [round(middle - half, 4), round(middle + half, 4)],
            "by_digit": each,
        }
    }


def train(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    model = build_model()
    averaged = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(AVERAGED)
    )
    optimiser = torch.optim.AdamW(model.parameters(), lr=args.rate, weight_decay=0.05, fused=True)
    pictures, labels = (torch.from_numpy(x) for x in digits(held_out=False))
    checkpoint, done = args.work / "vit-digits.pt", 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        done = state["step"]
        model.load_state_dict(state["model"])
        averaged.load_state_dict(state["averaged"])
        optimiser.load_state_dict(state["optimiser"])
        torch.set_rng_state(state["rng"])
    model.train()
    recent = 0.0
    bar = tqdm(range(done, args.steps), initial=done, total=args.steps, mininterval=5, disable=args.quiet)
    for step in bar:
        for group in optimiser.param_groups:
            group["lr"] = (
                args.rate * min(1, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / args.steps))
            )
        # The draws hang on the seed and the step alone, so that a resumed run sees what an unbroken one would.
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        drawn = torch.randint(len(labels), (args.batch,), generator=generator)
        logits = model(pixels(varied(pictures[drawn][:, None], generator))).logits
        loss = cross_entropy(logits, labels[drawn], label_smoothing=0.05)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        averaged.update_parameters(model)
        recent += (float(loss.detach()) - recent) / min(step + 1, 50)
        bar.set_postfix(loss=f"{recent:.3f}", refresh=False)
        if (step + 1) % args.every == 0 or step + 1 == args.steps:
            state = {"step": step + 1, "model": model.state_dict(), "averaged": averaged.state_dict()}
            state |= {"optimiser": optimiser.state_dict(), "rng": torch.get_rng_state()}
            save_checkpoint(checkpoint, state)
    finished = averaged.module.eval()
    finished.save_pretrained(args.out)
    (args.out / "model.safetensors").chmod(0o644)
    build_processor().save_pretrained(args.out)
    figures = measure(finished)
    figures["training"] = {k: getattr(args, k) for k in ("seed", "steps", "rate", "batch")} | {
        "parameters": finished.num_parameters()
    }
    (args.out / "metrics.json").write_text(json.dumps(figures, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=HERE, help="folder of the finished model")
    parser.add_argument(
        "--work", type=Path, required=True, help="folder of the checkpoint, not in the repository"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--every", type=int, default=200, help="steps between checkpoints")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
