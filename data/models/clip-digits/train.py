"""Trains clip-digits: python train.py; killed and started again, it goes on from its last checkpoint.

A step compares `--batch` canvases with captions of them, two a canvas. A caption may hold of many canvases, so the
targets of a row are all that hold, in equal shares; in the plain contrastive loss `a dim digit` would be wrong of
every canvas but one.
"""

import argparse
import json
import math
import os
import random
import sys
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.nn.functional import affine_grid, grid_sample
from tqdm import tqdm
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor, PreTrainedTokenizerFast

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[2])]

from headwater.data.pictures.canvases import DIM, SIZE, Canvas, canvas  # noqa: E402
from headwater.data.pictures.captions import caption_of, holds, single  # noqa: E402
from headwater.data.pictures.digits import digits  # noqa: E402

SPECIAL = ("<pad>", "<unk>", "<bos>", "<eos>")
PAD, _, BOS, EOS = range(4)
CONTEXT, WIDTH = 16, 64
# From this step on the rate falls to 0, a step is half as large, and most captions name a digit: places, brightness and
# numbers are known by then.
FALLS, AGAIN = 700, 1200


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word, between `<bos>` and `<eos>`."""
    words = sorted({word for caption in single() for word in caption.words.split()})
    vocabulary = {word: i for i, word in enumerate((*SPECIAL, ",", *words))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation("isolated")]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", BOS), ("<eos>", EOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<bos>",
        eos_token="<eos>",
        model_max_length=CONTEXT,
        padding_side="right",
    )


def build_processor() -> CLIPProcessor:
    """Any picture becomes one of 16×16 pixels from -1 to 1."""
    size = {"height": SIZE, "width": SIZE}
    images = CLIPImageProcessorPil(
        size=size, do_center_crop=False, image_mean=[0.5] * 3, image_std=[0.5] * 3, resample=3
    )
    return CLIPProcessor(images, build_tokenizer())


def build_model(vocabulary: int) -> CLIPModel:
    """Towers of four and of two layers with fresh weights; the eyes see 64 patches of 2×2 pixels."""
    shared = {
        "hidden_size": WIDTH,
        "num_attention_heads": 4,
        "intermediate_size": 2 * WIDTH,
        "hidden_act": "gelu",
    }
    text = {"vocab_size": vocabulary, "num_hidden_layers": 2, "max_position_embeddings": CONTEXT}
    text |= {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
    vision = {"image_size": SIZE, "patch_size": 2, "num_hidden_layers": 4}
    config = CLIPConfig(
        text_config=shared | text, vision_config=shared | vision, projection_dim=WIDTH, initializer_factor=1.0
    )
    return CLIPModel(config)


def pixels(found: list[Canvas], noise: torch.Generator | None = None) -> torch.Tensor:
    """[canvas, 3, 16, 16] from -1 to 1; with `noise` each digit is turned, sheared, stretched and moved a little."""
    things = [(n, place, thing) for n, c in enumerate(found) for place, thing in enumerate(c.things) if thing]
    inks = digits(found[0].held_out)[0][[thing.picture for *_, thing in things]]
    ink = torch.from_numpy(inks)[:, None]
    if noise is not None:
        turn = torch.eye(2) + 0.12 * torch.randn(len(things), 2, 2, generator=noise)
        move = 0.12 * torch.randn(len(things), 2, 1, generator=noise)
        grid = affine_grid(torch.cat([turn, move], -1), list(ink.shape), align_corners=False)
        ink = grid_sample(ink, grid, align_corners=False)
    half = SIZE // 2
    whole = torch.zeros(len(found), SIZE, SIZE)
    for (n, place, thing), one in zip(things, ink[:, 0], strict=True):
        row, column = divmod(place, 2)
        part = (n, slice(half * row, half * (row + 1)), slice(half * column, half * (column + 1)))
        whole[part] = one * (1.0 if thing.bright else DIM)
    if noise is not None:
        whole = whole + 0.03 * torch.randn(whole.shape, generator=noise)
    return (2 * whole - 1)[:, None].expand(-1, 3, -1, -1)


def encoded(tokenizer: PreTrainedTokenizerFast, words: list[str]) -> dict[str, torch.Tensor]:
    """Ids and mask, padded to the longest."""
    return dict(tokenizer(words, padding=True, return_tensors="pt", return_token_type_ids=False))


def loss_of(logits: torch.Tensor, true: torch.Tensor) -> torch.Tensor:
    """Cross entropy with all that hold as targets, over captions of a canvas and over canvases of a caption."""
    total = logits.new_zeros(())
    for scores, held in ((logits, true), (logits.T, true.T)):
        target = held.float() / held.sum(-1, keepdim=True)
        total = total - (target * scores.log_softmax(-1)).sum(-1).mean() / 2
    return total


def share_of_rate(step: int, steps: int) -> float:
    """Up in 100 steps, slowly down to step 700, from there in a line to 0 at AGAIN, and once more from 0.6 to 0."""
    slow = min(1, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * min(step, FALLS) / 2000))
    fall = (AGAIN - step) / (AGAIN - FALLS) if step < AGAIN else 0.6 * (steps - step) / (steps - AGAIN)
    return slow * min(1.0, fall)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1800)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=1e9, help="stop and go on another time")
    parser.add_argument("--out", type=Path, default=HERE)
    parser.add_argument("--work", type=Path, default=Path("clip-digits.pt"), help="checkpoint")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    processor = build_processor()
    tokenizer = processor.tokenizer
    model = build_model(len(tokenizer))
    slow = [p for p in model.parameters() if p.ndim < 2]
    fast = [p for p in model.parameters() if p.ndim >= 2]
    groups = [{"params": fast, "weight_decay": 0.05}, {"params": slow, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=args.rate, betas=(0.9, 0.98))
    step, log, recent, began = 0, [], 0.0, time.time()
    if args.work.exists():
        saved = torch.load(args.work, weights_only=True)
        model.load_state_dict(saved["model"])
        optimiser.load_state_dict(saved["optimiser"])
        step, log, recent = saved["step"], saved["log"], saved["recent"]

    def keep() -> None:
        state = {"model": model.state_dict(), "optimiser": optimiser.state_dict()}
        torch.save(state | {"step": step, "log": log, "recent": recent}, args.work.with_suffix(".part"))
        os.replace(args.work.with_suffix(".part"), args.work)

    bar = tqdm(total=args.steps, initial=step, mininterval=5)
    while step < args.steps and time.time() - began < 60 * args.minutes:
        rng = random.Random(f"{args.seed} {step}")
        noise = torch.Generator().manual_seed(rng.randrange(2**40))
        alone = max(0.3, 0.9 - 0.0006 * step)  # canvases of one digit, which are easier, come first
        found = [
            canvas(rng, count=1 if rng.random() < alone else None)
            for _ in range(args.batch // (1 if step < FALLS else 2))
        ]
        captions = [caption_of(c, rng, 0.0 if step < FALLS else 0.8) for c in found for _ in range(2)]
        true = torch.from_numpy(holds(captions, found))
        for group in optimiser.param_groups:
            group["lr"] = args.rate * share_of_rate(step, args.steps)
        texts = encoded(tokenizer, [caption.words for caption in captions])
        logits = model(pixel_values=pixels(found, noise), **texts).logits_per_image
        loss = loss_of(logits, true)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=math.log(100))
        step += 1
        recent += (float(loss.detach()) - recent) / min(step, 50)
        bar.update()
        bar.set_postfix(loss=f"{recent:.3f}")
        if step % 100 == 0:
            log.append([step, round(recent, 4)])
            keep()
    keep()
    if step >= args.steps:
        args.out.mkdir(exist_ok=True, parents=True)
        model.half().save_pretrained(args.out)
        processor.save_pretrained(args.out)
        training = {name: getattr(args, name) for name in ("steps", "batch", "rate", "seed")} | {"loss": log}
        (args.out / "metrics.json").write_text(json.dumps({"training": training}, indent=1) + "\n")


if __name__ == "__main__":
    main()
