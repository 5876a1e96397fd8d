"""Trains the sink family: one small model per rule of attention, same data, same seed: python train.py --work FOLDER.

`sigmoid-continued` begins with the finished weights of `softmax`, so that one is trained first.

Killed and started again, it goes on from the last checkpoint of the variant it was at.
"""

import argparse
import json
import math
import os
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import AttentionInterface, SmolLM3Config, SmolLM3ForCausalLM

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
import measure  # noqa: E402
from language import BOS, VOCABULARY, texts, tokenizer  # noqa: E402

LAYERS, HEADS, WIDTH, LENGTH = 2, 4, 64, 64
# what a variant changes: the normaliser of the attention weights, a learned key and value per head, the positions;
# a variant may also begin where another ended, with its own number of steps and learning rate; `hold` is the weight of
# a penalty on rows that sum to more than 1
TRAINING = ("positions", "start", "steps", "lr", "layers", "hold")
MARKS = (
    0,
    50,
    100,
    200,
    400,
    600,
    800,
)  # steps whose weights are kept of a variant that begins where another ended
VARIANTS = {
    "softmax": {"normaliser": "softmax"},
    "softmax1": {"normaliser": "softmax1"},
    "sigmoid": {"normaliser": {"name": "sigmoid", "bias": -math.log(LENGTH)}, "hold": 1.0, "steps": 4000},
    "kvbias": {"normaliser": "softmax", "kv_bias": True},
    "nope": {"normaliser": "softmax", "positions": "none"},
    "sigmoid-continued": {
        "normaliser": {"name": "sigmoid", "bias": -math.log(LENGTH)}, "start": "softmax", "steps": 1000, "lr": 3e-3,
    },
}  # fmt: skip


def build(variant: dict) -> SmolLM3ForCausalLM:
    """A SmolLM3 (a Llama that may leave the rotary positions out) with fresh weights."""
    layers = variant.get("layers", LAYERS)
    config = SmolLM3Config(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=layers,
        num_attention_heads=HEADS, num_key_value_heads=HEADS, max_position_embeddings=256, initializer_range=0.05,
        tie_word_embeddings=False, pad_token_id=None, bos_token_id=BOS, eos_token_id=None, use_sliding_window=False,
        no_rope_layers=[0 if variant.get("positions") == "none" else 1] * layers,
    )  # fmt: skip
    config.headwater_attention = {k: v for k, v in variant.items() if k not in TRAINING}
    model = SmolLM3ForCausalLM(config)
    model.set_attn_implementation("sink_family")
    for layer in model.model.layers:
        layer.self_attn.variant = variant
        if variant.get("kv_bias"):
            layer.self_attn.bias_key = nn.Parameter(torch.randn(HEADS, WIDTH // HEADS) * 0.05)
            layer.self_attn.bias_value = nn.Parameter(torch.zeros(HEADS, WIDTH // HEADS))
    return model


def attention(module, q: Tensor, k: Tensor, v: Tensor, mask, scaling: float, **_) -> tuple[Tensor, Tensor]:
    """Dense causal attention under the variant's rule; texts have one length, so there is no padding.

    A bias "row" is -ln n for a row of n keys, with which a sigmoid begins near what a softmax does.
    """
    variant = module.variant
    scores = scaling * q @ k.mT
    hidden = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).triu(1)
    rule = variant["normaliser"]
    name, bias = (rule, 0.0) if isinstance(rule, str) else (rule["name"], rule["bias"])
    if name == "sigmoid":
        if bias == "row":
            bias = -torch.arange(1, q.shape[2] + 1).log()[:, None]
        weights = torch.sigmoid(scores + bias).masked_fill(hidden, 0.0)
        return (weights @ v).transpose(1, 2).contiguous(), weights
    scores = scores.masked_fill(hidden, float("-inf"))
    beside = []
    if name == "softmax1":
        beside.append(torch.zeros_like(scores[..., :1]))
    if variant.get("kv_bias"):
        beside.append(scaling * torch.einsum("bhqd,hd->bhq", q, module.bias_key)[..., None])
    whole = torch.cat([scores, *beside], -1).softmax(-1)
    weights = whole[..., : k.shape[2]]
    z = weights @ v
    if variant.get("kv_bias"):
        z = z + whole[..., -1:] * module.bias_value[:, None]
    return z.transpose(1, 2).contiguous(), weights


AttentionInterface.register("sink_family", attention)


def learning_rate(step: int, steps: int, lr: float) -> float:
    return lr * min(1.0, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / steps))


def optimiser_of(model: SmolLM3ForCausalLM) -> torch.optim.Optimizer:
    decayed = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim != 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95))


def excess(maps: tuple[Tensor, ...]) -> Tensor:
    """Mean over rows of the square of what their weights sum to above 1; nothing for rows that sum to less."""
    return torch.stack(maps).sum(-1).sub(1).clamp_min(0).square().mean()


def learn(
    model: SmolLM3ForCausalLM, optimiser: torch.optim.Optimizer, rows: Tensor, lr: float, hold: float = 0.0
) -> None:
    """One step on texts of `LENGTH` + 1 tokens."""
    for group in optimiser.param_groups:
        group["lr"] = lr
    told = model(rows[:, :-1], use_cache=False, output_attentions=hold > 0)
    loss = cross_entropy(told.logits.flatten(0, 1), rows[:, 1:].flatten())
    if hold:
        loss = loss + hold * excess(told.attentions)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimiser.step()
    optimiser.zero_grad()


def save(path: Path, state: dict) -> None:
    """A kill in the middle of writing leaves the previous checkpoint whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    torch.save(state, part)
    os.replace(part, path)


def train(name: str, args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    variant = VARIANTS[name]
    model, steps, lr = build(variant), variant.get("steps", args.steps), variant.get("lr", args.lr)
    if start := variant.get("start"):
        model.load_state_dict(load_file(args.out / f"sink-2l-{start}" / "model.safetensors"))
    optimiser = optimiser_of(model)
    checkpoint, done, marks = args.work / f"{name}.pt", 0, {}
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        done = state["step"]
        model.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        marks = state["marks"]
    for step in tqdm(range(done, steps), initial=done, total=steps, mininterval=5, desc=name):
        if start and step in MARKS:
            marks |= {f"{step}.{n}": p.detach().half() for n, p in model.state_dict().items()}
        rows = texts(args.batch, LENGTH + 1, f"train {args.seed} {step}")
        learn(model, optimiser, rows, learning_rate(step, steps, lr), variant.get("hold", 0.0))
        if (step + 1) % args.every == 0 or step + 1 == steps:
            figures = measure.everything(model, draws=32, seed=f"watch {step}")
            tqdm.write(f"{time.strftime('%X')} {name} {step + 1} {json.dumps(figures)}")
            state = {"step": step + 1, "model": model.state_dict(), "optimiser": optimiser.state_dict()}
            state["marks"] = marks
            save(checkpoint, state)
    held = {"hold": variant["hold"]} if "hold" in variant else {}
    export(name, model, args, {"steps": steps, "lr": lr} | held)
    if marks:
        kept = args.out / f"sink-2l-{name}" / "checkpoints.safetensors"
        save_file(marks, kept)
        kept.chmod(0o644)


def export(name: str, model: SmolLM3ForCausalLM, args: argparse.Namespace, run: dict) -> None:
    """The model as transformers reads it; a learned key and value go into a file beside it."""
    folder = args.out / f"sink-2l-{name}"
    weights = {n: p.detach().clone() for n, p in model.state_dict().items() if ".bias_" not in n}
    model.save_pretrained(folder, state_dict=weights)
    (folder / "model.safetensors").chmod(0o644)
    tokenizer().save_pretrained(folder)
    beside = {n: p.detach().clone() for n, p in model.state_dict().items() if ".bias_" in n}
    if beside:
        save_file(beside, folder / "attention.safetensors")
    figures = measure.everything(model, draws=args.draws, seed="held-out")
    figures["training"] = {"seed": args.seed, **run, "batch": args.batch}
    (folder / "metrics.json").write_text(json.dumps(figures, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=HERE.parent, help="folder that holds the finished models")
    parser.add_argument(
        "--work", type=Path, required=True, help="folder of checkpoints, not in the repository"
    )
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--lr", type=float, default=5e-3)
    parser.add_argument("--batch", type=int, default=32, help="texts per step")
    parser.add_argument("--every", type=int, default=500, help="steps between checkpoints")
    parser.add_argument("--draws", type=int, default=200, help="held-out texts measured at the end")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name in args.variants:
        train(name, args)


if __name__ == "__main__":
    main()
