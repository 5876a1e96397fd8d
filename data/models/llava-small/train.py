"""Trains the projector of llava-small: python train.py; killed and started again, it goes on from its last checkpoint.

Needs `headwater models add smollm2-135m dinov2-small`. Both models stay frozen; the projector alone learns.
"""

import argparse
import json
import math
import os
import random
import sys
import time
from pathlib import Path

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
)  # hidden states of the tower that the projector reads: colours are clearer in the earlier one


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
    return {"ids": ids, "mask": mask[:, None], "target": target, "position": position}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--questions", type=int, default=4)
    parser.add_argument("--rate", type=float, default=1e-3)
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
    language = (
        AutoModelForCausalLM.from_pretrained(
            args.models / "smollm2-135m",
            dtype=torch.bfloat16,
            local_files_only=True,
            attn_implementation="eager",
        )
        .eval()
        .requires_grad_(False)
    )
    tower = Dinov2Model.from_pretrained(args.models / "dinov2-small", local_files_only=True).eval()
    embed, head = language.get_input_embeddings(), language.get_output_embeddings()
    width = tower.config.hidden_size * len(LAYERS)
    projector = Projector(width, language.config.hidden_size, 3 * float(embed.weight.float().std()))
    optimiser = torch.optim.AdamW(projector.parameters(), lr=args.rate, betas=(0.9, 0.98), weight_decay=0.01)
    step, log, began = 0, [], time.time()
    if args.work.exists():
        saved = torch.load(args.work, weights_only=True)
        projector.load_state_dict(saved["projector"])
        optimiser.load_state_dict(saved["optimiser"])
        step, log = saved["step"], saved["log"]

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
            done = step / args.steps
            group["lr"] = args.rate * min(1, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * done))
        given = embed(batch["ids"])
        picture = projector(patches(tower, found)).to(given.dtype)
        place = (batch["ids"] == 3)[..., None].expand_as(given)
        given = given.masked_scatter(place, picture)
        states = language.model(
            inputs_embeds=given, attention_mask=batch["mask"], position_ids=batch["position"], use_cache=False
        ).last_hidden_state
        asked = batch["target"] != -100
        logits = head(states[asked]).float()
        loss = torch.nn.functional.cross_entropy(logits, batch["target"][asked])
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(projector.parameters(), 1.0)
        optimiser.step()
        step += 1
        recent += (float(loss.detach()) - recent) / min(step, 50)
        bar.update()
        bar.set_postfix(loss=f"{recent:.3f}")
        if step % 100 == 0:
            log.append([step, round(recent, 4)])
            keep()
    keep()
    if step >= args.steps:
        args.out.mkdir(exist_ok=True)
        save_file(
            {k: v.contiguous() for k, v in projector.state_dict().items()}, args.out / "projector.safetensors"
        )
        (args.out / "training.json").write_text(
            json.dumps({"loss": log, **vars(args)}, default=str, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
