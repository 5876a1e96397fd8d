"""Trains video-digits: python train.py; killed and started again, it goes on from its last checkpoint.

While it trains, a second head reads from the tokens of each frame, behind the second layer, in which column the digit
stands there and in the next frame. Without it the movement was at chance after 1,500 steps: it is the conjunction of
two frames, and no single frame tells anything of it. The second head is not part of the model.
"""

import argparse
import json
import math
import os
import random
import sys
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import nll_loss
from tqdm import tqdm
from transformers import VideoMAEConfig, VideoMAEForVideoClassification
from transformers.models.videomae.image_processing_pil_videomae import VideoMAEImageProcessorPil

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[2])]

from headwater.data.pictures import films  # noqa: E402

MEAN, STD = 0.1, 0.3


def build_model() -> VideoMAEForVideoClassification:
    """Three layers of four heads over 4 × 4 × 4 patches, one frame deep; the classes are read off the mean patch."""
    return VideoMAEForVideoClassification(
        VideoMAEConfig(
            image_size=films.SIZE,
            patch_size=films.PATCH,
            num_frames=films.FRAMES,
            tubelet_size=1,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=3,
            num_attention_heads=4,
            use_mean_pooling=True,
            initializer_range=0.12,  # with 0.02 a width of 64 attends evenly, and the movement is not learned
            num_labels=len(films.NAMES),
            id2label=dict(enumerate(films.NAMES)),
            label2id={name: n for n, name in enumerate(films.NAMES)},
        )
    )


def given(drawn: list[films.Film]) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels [film, frame, 3, 16, 16] as the processor makes them, and classes [film]."""
    pixels = torch.from_numpy(np.stack([film.pixels() for film in drawn]))
    pixels = ((pixels * 255).round() / 255 - MEAN) / STD
    return pixels[:, :, None].expand(-1, -1, 3, -1, -1), torch.tensor([film.label for film in drawn])


def shares(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of the ten digits and of the movements."""
    joint = logits.log_softmax(-1).view(-1, 10, len(films.MOVES))
    return joint.logsumexp(2), joint.logsumexp(1)


def columns_loss(reader: torch.nn.Module, states: torch.Tensor, drawn: list[films.Film]) -> torch.Tensor:
    """How badly the columns of a frame and of the next are read from its mean token; states [film, token, 64]."""
    side = films.SIZE // films.PATCH
    columns = torch.tensor([film.columns() for film in drawn])
    own, later = reader(states.unflatten(1, (films.FRAMES, -1)).mean(2)).split(side, -1)
    parts = (own, columns), (later[:, :-1], columns[:, 1:])
    return sum(nll_loss(x.log_softmax(-1).flatten(0, 1), y.flatten()) for x, y in parts)


@torch.no_grad()
def measured(model: VideoMAEForVideoClassification, count: int, seed: int) -> dict[str, float]:
    """Share of held-out films whose digit, movement, or both are read, and the half-width of 95 % of each."""
    rng = random.Random(f"held out {seed}")
    x, labels = given([films.film(rng, held_out=True) for _ in range(count)])
    logits = torch.cat([model(pixel_values=part).logits for part in x.split(500)])
    found, moves = logits.argmax(-1), len(films.MOVES)
    digit, move = (each.argmax(-1) for each in shares(logits))
    right = {"digit": digit == labels // moves, "move": move == labels % moves, "both": found == labels}
    told = {name: float(each.float().mean()) for name, each in right.items()}
    return told | {f"{name}_error": 1.96 * math.sqrt(p * (1 - p) / count) for name, p in told.items()}


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    model = build_model()
    reader = torch.nn.Linear(model.config.hidden_size, 2 * films.SIZE // films.PATCH)
    both = torch.nn.ModuleList([model, reader])
    optimiser = torch.optim.AdamW(both.parameters(), lr=args.rate, betas=(0.9, 0.98), weight_decay=0.05)
    done, log = 0, []
    if args.work.exists():
        saved = torch.load(args.work, weights_only=True)
        both.load_state_dict(saved["models"])
        optimiser.load_state_dict(saved["optimiser"])
        done, log = saved["step"], saved["log"]
    recent = 0.0
    bar = tqdm(range(done, args.steps), initial=done, total=args.steps, mininterval=5)
    for step in bar:
        rng = random.Random(f"train {args.seed} {step}")
        drawn = [films.film(rng) for _ in range(args.batch)]
        x, labels = given(drawn)
        for group in optimiser.param_groups:
            group["lr"] = (
                args.rate * min(1, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / args.steps))
            )
        out = model(pixel_values=x, output_hidden_states=True)
        digit, move = shares(out.logits)
        moves = len(films.MOVES)
        loss = nll_loss(digit, labels // moves) + nll_loss(move, labels % moves)
        optimiser.zero_grad()
        (loss + columns_loss(reader, out.hidden_states[2], drawn)).backward()
        torch.nn.utils.clip_grad_norm_(both.parameters(), 1.0)
        optimiser.step()
        recent += (float(loss.detach()) - recent) / min(step - done + 1, 50)
        bar.set_postfix(loss=f"{recent:.3f}")
        if (step + 1) % args.every == 0 or step + 1 == args.steps:
            log.append([step + 1, round(recent, 4)])
            state = {"models": both.state_dict(), "optimiser": optimiser.state_dict()}
            torch.save(state | {"step": step + 1, "log": log}, args.work.with_suffix(".part"))
            os.replace(args.work.with_suffix(".part"), args.work)
            tqdm.write(f"{step + 1} {recent:.3f} {measured(model.eval(), 300, 1)}")
            model.train()
    model.eval().save_pretrained(args.out)
    size = {"height": films.SIZE, "width": films.SIZE}
    scaled = {"image_mean": [MEAN] * 3, "image_std": [STD] * 3, "do_resize": False, "do_center_crop": False}
    VideoMAEImageProcessorPil(size=size, crop_size=size, **scaled).save_pretrained(args.out)
    figures = {"held_out": measured(model, args.draws, 0) | {"films": args.draws}}
    figures["training"] = {"seed": args.seed, "steps": args.steps, "batch": args.batch, "rate": args.rate}
    figures["training"] |= {"parameters": model.num_parameters(), "loss": log}
    (args.out / "metrics.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=HERE, help="folder of the finished model")
    parser.add_argument("--work", type=Path, required=True, help="checkpoint, not in the repository")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--every", type=int, default=200, help="steps between checkpoints")
    parser.add_argument("--draws", type=int, default=2000, help="held-out films at the end")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
