"""Trains the projector of llava-small: python train.py; killed and started again, it goes on from its last checkpoint.

Needs `headwater models add smollm2-135m dinov2-small`. Both models stay frozen; the projector alone learns, in two
stages. First it learns to say words: a patch becomes the embedding of the colour or of the kind of what stands in its
quarter, in turn along a row. That takes minutes. Then it learns from the language model's answers to questions.
`python examples/_count_llava_small.py` counts what it gets right.
"""

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
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, Dinov2Model

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[2])]
from headwater.data.pictures import scenes  # noqa: E402

QUESTIONS = ("caption", "caption", "presence", "presence", "presence", "place", "place", "colour")
MEAN, STD = (torch.tensor(x).view(3, 1, 1) for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
LAYERS = (
    4,
    -1,
)  # hidden states of the tower that the projector reads; colours are clearer in the earlier one
ALIKE = (
    700  # from this step on each answer counts alike; before it each token, and captions have most of them
)


class Projector(torch.nn.Module):
    """As transformers' LlavaMultiModalProjector."""

    def __init__(self, width: int, out: int, scale: float) -> None:
        super().__init__()
        self.linear_1 = torch.nn.Linear(width, out)
        self.linear_2 = torch.nn.Linear(out, out)
        with torch.no_grad():  # outputs of the size of the model's own embeddings
            self.linear_2.weight.mul_(scale)
            self.linear_2.bias.zero_()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear_2(torch.nn.functional.gelu(self.linear_1(x)))


def pixels(found: list[scenes.Scene]) -> torch.Tensor:
    """[scene, 3, 112, 112], normalised as DINOv2 was."""
    stacked = torch.stack([torch.from_numpy(np.array(s.picture())).permute(2, 0, 1) for s in found])
    return (stacked.float() / 255 - MEAN) / STD


@torch.no_grad()
def patches(tower: Dinov2Model, found: list[scenes.Scene]) -> torch.Tensor:
    """What the projector reads, [scene, 64, width]: hidden states without the class token."""
    states = tower(pixels(found), output_hidden_states=True).hidden_states
    return torch.cat([states[layer][:, 1:] for layer in LAYERS], -1)


def packed(tokenizer, found: list[scenes.Scene], rng: random.Random, count: int) -> dict[str, torch.Tensor]:
    """Several questions behind one picture, none of which sees another: ids, who sees whom, positions, targets."""
    opening = tokenizer("<|im_start|>user\n")["input_ids"]
    start = len(opening) + 64
    rows = []
    for s in found:
        ids, block, target, position = opening + [3] * 64, [0] * start, [-100] * start, list(range(start))
        for n in range(count):
            asked, answer = scenes.question(rng.choice(QUESTIONS), s, rng)
            q = tokenizer(f"\n{asked}<|im_end|>\n<|im_start|>assistant\n")["input_ids"]
            a = tokenizer(f"{answer}<|im_end|>")["input_ids"]
            ids += q + a
            block += [n + 1] * len(q + a)
            target += [-100] * (len(q) - 1) + a + [-100]
            position += range(start, start + len(q + a))
        rows.append((ids, block, target, position))
    longest = max(len(r[0]) for r in rows)
    fill = (2, -1, -100, 0)
    ids, block, target, position = (
        torch.tensor([r[k] + [fill[k]] * (longest - len(r[k])) for r in rows]) for k in range(4)
    )
    seen = (block[:, None, :] == block[:, :, None]) | (block[:, None, :] == 0)
    seen &= torch.ones(longest, longest, dtype=torch.bool).tril()
    mask = torch.zeros(seen.shape, dtype=torch.bfloat16).masked_fill(~seen, torch.finfo(torch.bfloat16).min)
    return {"ids": ids, "mask": mask[:, None], "target": target, "position": position, "block": block}


def words_of(tokenizer, found: list[scenes.Scene]) -> torch.Tensor:
    """The word that each patch is to become, token ids [scene, 64]: colour, kind, colour, kind … along a row."""

    def token(word: str) -> int:
        return tokenizer(f" {word}")["input_ids"][0]

    grid = torch.full((len(found), 8, 8), token("nothing"))
    for row, s in enumerate(found):
        for place, thing in enumerate(s.things):
            if thing:
                top, left = 4 * (place // 2), 4 * (place % 2)
                for side, word in enumerate(thing):
                    grid[row, top : top + 4, left + side : left + 4 : 2] = token(word)
    return grid.flatten(1)


def say_words(projector: Projector, tower: Dinov2Model, tokenizer, embed, steps: int, seed: int) -> float:
    """The first stage; gives the share of patches of the last batches whose nearest word is the right one."""
    optimiser = torch.optim.AdamW(projector.parameters(), lr=3e-3, weight_decay=0.01)
    bar = tqdm(range(steps), desc="words", mininterval=5)
    right = 0.0
    for step in bar:
        rng = random.Random(f"words {seed} {step}")
        found = [scenes.scene(rng) for _ in range(16)]
        wanted = words_of(tokenizer, found)
        said, table = projector(patches(tower, found)), embed.weight.float()
        known = wanted.unique()
        target = torch.nn.functional.embedding(wanted, table)
        near = torch.searchsorted(known, wanted)
        logits = (
            10
            * torch.nn.functional.normalize(said, dim=-1)
            @ torch.nn.functional.normalize(table[known], dim=-1).T
        )
        size = float(table.var())
        loss = (said - target).square().mean() / size + torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), near.flatten()
        )
        for group in optimiser.param_groups:
            group["lr"] = 3e-3 * min(1, (step + 1) / 20) * (1 - step / steps)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        right += (float((logits.argmax(-1) == near).float().mean()) - right) / min(step + 1, 20)
        bar.set_postfix(loss=f"{float(loss.detach()):.3f}", right=f"{right:.3f}")
    return right


def weights(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Of each token in the loss, [scene, token], where each answer counts alike; they sum to 1."""
    asked = batch["target"] != -100
    answers = batch["block"] + 100 * torch.arange(len(asked))[:, None]
    _, which, lengths = answers[asked].unique(return_inverse=True, return_counts=True)
    found = torch.zeros(asked.shape)
    found[asked] = 1 / lengths[which] / len(lengths)
    return found


def rate_at(step: int, steps: int, rate: float, again: float) -> float:
    """The learning rate: a cosine from `rate` up to ALIKE, and another from `again` behind it."""
    start, end, warm, peak = (ALIKE, steps, 20, again) if step >= ALIKE else (0, min(ALIKE, steps), 100, rate)
    done = (step - start) / (end - start)
    return peak * min(1, (step - start + 1) / warm) * 0.5 * (1 + math.cos(math.pi * done))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--questions", type=int, default=8)
    parser.add_argument("--words", type=int, default=250, help="steps of the first stage")
    parser.add_argument("--rate", type=float, default=7e-4)
    parser.add_argument(
        "--again", type=float, default=4e-4, help="the rate where answers begin to count alike"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=1e9, help="stop and go on another time")
    parser.add_argument(
        "--models", type=Path, default=Path.home() / ".cache/headwater/models", help="where both lie"
    )
    parser.add_argument("--out", type=Path, default=HERE)
    parser.add_argument("--work", type=Path, default=Path("llava-small.pt"), help="checkpoint")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.models / "smollm2-135m", local_files_only=True)
    language: Any = (
        AutoModelForCausalLM.from_pretrained(
            args.models / "smollm2-135m",
            dtype=torch.bfloat16,
            local_files_only=True,
            attn_implementation="eager",
        )
        .eval()
        .requires_grad_(False)
    )
    tower: Any = Dinov2Model.from_pretrained(args.models / "dinov2-small", local_files_only=True).eval()
    embed, head = language.get_input_embeddings(), language.lm_head
    width = tower.config.hidden_size * len(LAYERS)
    projector = Projector(width, language.config.hidden_size, 3 * float(embed.weight.float().std()))
    optimiser = torch.optim.AdamW(projector.parameters(), lr=args.rate, betas=(0.9, 0.98), weight_decay=0.01)
    step, log, began = 0, [], time.time()
    if args.work.exists():
        saved = torch.load(args.work, weights_only=True)
        projector.load_state_dict(saved["projector"])
        optimiser.load_state_dict(saved["optimiser"])
        step, log = saved["step"], saved["log"]
    else:
        right = say_words(projector, tower, tokenizer, embed, args.words, args.seed)
        log.append(["share of patches with the right word", round(right, 3)])

    def keep() -> None:
        state = {
            "projector": projector.state_dict(),
            "optimiser": optimiser.state_dict(),
            "step": step,
            "log": log,
        }
        torch.save(state, args.work.with_suffix(".part"))
        os.replace(args.work.with_suffix(".part"), args.work)

    bar = tqdm(total=args.steps, initial=step, mininterval=5)
    recent = 0.0
    while step < args.steps and time.time() - began < 60 * args.minutes:
        rng = random.Random(f"{args.seed} {step}")
        found = [scenes.scene(rng) for _ in range(args.batch)]
        batch = packed(tokenizer, found, rng, args.questions)
        for group in optimiser.param_groups:
            group["lr"] = rate_at(step, args.steps, args.rate, args.again)
        given = embed(batch["ids"])
        picture = projector(patches(tower, found)).to(given.dtype)
        place = (batch["ids"] == 3)[..., None].expand_as(given)
        given = given.masked_scatter(place, picture)
        states = language.model(
            inputs_embeds=given, attention_mask=batch["mask"], position_ids=batch["position"], use_cache=False
        ).last_hidden_state
        asked = batch["target"] != -100
        logits = head(states[asked]).float()
        losses = torch.nn.functional.cross_entropy(logits, batch["target"][asked], reduction="none")
        loss = (losses * weights(batch)[asked]).sum() if step >= ALIKE else losses.mean()
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(projector.parameters(), 1.0)
        optimiser.step()
        step += 1
        recent += (float(loss.detach()) - recent) / min(step, 50)
        bar.update()
        bar.set_postfix(loss=f"{recent:.3f}")
        if step % 50 == 0:
            log.append([step, round(recent, 4)])
            keep()
    keep()
    if step >= args.steps:
        args.out.mkdir(exist_ok=True)
        half = {k: v.half().contiguous() for k, v in projector.state_dict().items()}
        save_file(half, args.out / "projector.safetensors")
        (args.out / "training.json").write_text(
            json.dumps({"loss": log, **vars(args)}, default=str, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
