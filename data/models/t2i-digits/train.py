"""Trains the words-to-picture model; killed and started again, it goes on from its last checkpoint."""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, PixArtTransformer2DModel
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "tasks-4l"), str(HERE.parents[2])]
import measure  # noqa: E402
from muon import Muon  # noqa: E402

from headwater.data.pictures import drawings  # noqa: E402
from headwater.data.pictures.digits import WORDS  # noqa: E402

SPECIAL = ("<pad>", "<bos>", "<unk>")
HEADS, WIDTH, LAYERS, TEXT_WIDTH = 6, 72, 4, 48
DROPPED = 0.1  # share of prompts whose words are left out, for guidance
DECAY = 0.997  # of the mean of the weights that is kept


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, with `<bos>` put in front on encoding."""
    words = (*SPECIAL, *drawings.BRIGHTNESS, *WORDS, *drawings.PLACES, drawings.AND)
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", unk_token="<unk>",
        model_max_length=drawings.LONGEST, padding_side="right",
    )  # fmt: skip


def build_encoder(vocabulary: int) -> CLIPTextModel:
    """Words and their positions, and no layer: no word knows of another before the picture reads it."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocabulary, hidden_size=TEXT_WIDTH, intermediate_size=TEXT_WIDTH, projection_dim=TEXT_WIDTH,
            num_hidden_layers=0, num_attention_heads=1, max_position_embeddings=drawings.LONGEST,
            pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )
    )  # fmt: skip


def build_denoiser() -> PixArtTransformer2DModel:
    """Four blocks of self-attention, attention to words and a feed-forward layer, with six heads each."""
    model = PixArtTransformer2DModel(
        num_attention_heads=HEADS, attention_head_dim=WIDTH // HEADS, in_channels=1, out_channels=1,
        num_layers=LAYERS, cross_attention_dim=WIDTH, caption_channels=TEXT_WIDTH, sample_size=drawings.COLUMNS,
        patch_size=2, use_additional_conditions=False,
    )  # fmt: skip
    nn.init.zeros_(model.proj_out.weight)
    return model


def batch(step: int, args: argparse.Namespace, tokenizer: Any) -> tuple[Tensor, Any]:
    """Pictures from -1 to 1 and encoded prompts; the draws depend on the seed and the step alone."""
    rng = random.Random(f"train {args.seed} {step}")
    told = [drawings.draw(rng) for _ in range(args.batch)]
    pictures = torch.from_numpy(np.stack([drawings.pixels(things, rng) for things in told]))[:, None]
    texts = ["" if rng.random() < DROPPED else drawings.prompt(things) for things in told]
    return 2 * pictures - 1, tokenizer(texts, padding="max_length", return_tensors="pt")


def optimisers(both: nn.ModuleDict) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for all else."""
    named = dict(both.named_parameters())
    matrices = {
        n for n, p in named.items() if "transformer_blocks" in n and p.dim() == 2 and "table" not in n
    }
    return [
        Muon([named[n] for n in sorted(matrices)], weight_decay=0.02),
        torch.optim.AdamW(
            [{"params": [p for n, p in named.items() if n not in matrices], "scale": 0.5}],
            betas=(0.9, 0.98), weight_decay=0.01,
        ),
    ]  # fmt: skip


def save_checkpoint(path: Path, state: dict) -> None:
    """A kill in the middle of writing leaves the previous checkpoint whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    torch.save(state, part)
    os.replace(part, path)


def export(mean: nn.ModuleDict, tokenizer: Any, folder: Path) -> None:
    """Writes the folder of a pipeline, in half precision."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = {
        "transformer": mean["denoiser"], "text_encoder": mean["encoder"],
        "tokenizer": tokenizer, "scheduler": FlowMatchEulerDiscreteScheduler(),
    }  # fmt: skip
    dtypes = [p.dtype for p in mean.parameters()]
    mean.half()
    for name, part in parts.items():
        part.save_pretrained(folder / name)
    for parameter, dtype in zip(mean.parameters(), dtypes, strict=True):
        parameter.data = parameter.data.to(dtype)
    index = {name: [type(part).__module__.split(".")[0], type(part).__name__] for name, part in parts.items()}
    about = {
        "_class_name": "PixelPipeline", **index, "height": drawings.ROWS, "width": drawings.COLUMNS,
        "guidance_scale": measure.GUIDANCE, "num_inference_steps": measure.STEPS,
    }  # fmt: skip
    (folder / "model_index.json").write_text(json.dumps(about, indent=2) + "\n")


def train(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    tokenizer = build_tokenizer()
    both = nn.ModuleDict({"denoiser": build_denoiser(), "encoder": build_encoder(len(tokenizer))})
    mean = nn.ModuleDict({"denoiser": build_denoiser(), "encoder": build_encoder(len(tokenizer))}).eval()
    mean.load_state_dict(both.state_dict())
    opts = optimisers(both)
    reader, _ = measure.small_reader()
    checkpoint, done = args.work / "checkpoint.pt", 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        done = state["step"]
        both.load_state_dict(state["both"])
        mean.load_state_dict(state["mean"])
        for opt, saved in zip(opts, state["optimisers"], strict=True):
            opt.load_state_dict(saved)
    bar = tqdm(range(done, args.steps), initial=done, total=args.steps, mininterval=5, disable=args.quiet)
    losses: list[float] = []
    for step in bar:
        warm, rest = min(1.0, (step + 1) / 100), step / args.steps
        for opt in opts:
            group = opt.param_groups[0]
            group["lr"] = (
                args.lr * group.get("scale", 1.0) * warm * (0.02 + 0.49 * (1 + math.cos(math.pi * rest)))
            )
        pictures, given = batch(step, args, tokenizer)
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        noise = torch.randn(pictures.shape, generator=generator)
        times = torch.sigmoid(torch.randn(len(pictures), generator=generator))
        at = times[:, None, None, None]
        told = both["denoiser"](
            (1 - at) * pictures + at * noise, encoder_hidden_states=both["encoder"](given.input_ids).last_hidden_state,
            timestep=1000 * times, encoder_attention_mask=given.attention_mask,
        ).sample  # fmt: skip
        loss = (told - (noise - pictures)).square().mean()
        for opt in opts:
            opt.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(both.parameters(), 1.0)
        for opt in opts:
            opt.step()
        with torch.no_grad():
            kept = min(DECAY, (1 + step) / (10 + step))
            for old, new in zip(mean.parameters(), both.parameters(), strict=True):
                old.lerp_(new, 1 - kept)
        losses.append(loss.item())
        if (step + 1) % args.every == 0 or step + 1 == args.steps:
            found = measure.accuracy(
                (mean["denoiser"], mean["encoder"], tokenizer), reader, args.watch, seed=5
            )
            report = "  ".join(f"{name} {each['share']:.2f}" for name, each in found.items())
            tqdm.write(
                f"{time.strftime('%X')} {step + 1}  loss {np.mean(losses[-args.every :]):.4f}  {report}"
            )
            state = {"step": step + 1, "both": both.state_dict(), "mean": mean.state_dict()}
            save_checkpoint(checkpoint, {**state, "optimisers": [opt.state_dict() for opt in opts]})
    export(mean, tokenizer, args.out)
    figures = measure.everything(args.out, args.draws)
    figures["training"] = {name: getattr(args, name) for name in ("seed", "steps", "batch", "lr")}
    figures["training"]["parameters"] = sum(each.numel() for each in mean.parameters())
    (args.out / "metrics.json").write_text(json.dumps(figures, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=HERE, help="folder of the finished model")
    parser.add_argument(
        "--work", type=Path, required=True, help="folder of the checkpoint, not in the repository"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--lr", type=float, default=6e-3)
    parser.add_argument("--every", type=int, default=250, help="steps between checkpoints")
    parser.add_argument("--watch", type=int, default=100, help="prompts drawn at each checkpoint")
    parser.add_argument("--draws", type=int, default=400, help="prompts drawn at the end")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
