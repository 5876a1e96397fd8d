"""Trains the task model: python train.py; killed and started again, it goes on from its last checkpoint."""

import argparse
import json
import math
import os
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[2])]
import measure  # noqa: E402
from muon import Muon  # noqa: E402

from headwater.data.prompts import tasks  # noqa: E402

SPECIAL = ("<pad>", "<unk>", "<bos>", "<eos>")
PAD, UNK, BOS, EOS = range(4)
CONTEXT = 256
# From which step on: texts a step of each task, in the order of tasks.TASKS, and how easy they are.
PHASES = (
    (0, (8, 6, 3, 26), 0.95, 0.0),
    (500, (6, 30, 3, 14), 0.6, 0.0),
    (800, (6, 30, 3, 14), 0.3, 0.0),
    (850, (5, 30, 3, 10), 0.5, 0.85),
    (950, (8, 14, 6, 18), 0.1, 0.1),
    (1100, (24, 9, 6, 14), 0.1, 0.1),
    (1500, (6, 4, 26, 6), 0.1, 0.1),
    (1660, (6, 4, 40, 5), 0.1, 0.1),
)
OTHER_WEIGHT = 0.02
# The last phase trains answers alone: after "The capital of England is" the word "called" is possible too, and
# where only that was trained and the capital held out, the model said "called".
ANSWERS_ALONE = 1500
# From here on some words around a country are hidden, so that its capital hangs on no wording.
HIDDEN_WORDS = 1660


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word or punctuation mark, with `<bos>` put in front on encoding."""
    vocabulary = {word: i for i, word in enumerate((*SPECIAL, *tasks.vocabulary()))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation("isolated")]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", BOS)]
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


def build_model(vocabulary: int, tied: bool) -> LlamaForCausalLM:
    """A Llama of four layers and eight heads with fresh weights."""
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=256,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=8,
            num_key_value_heads=8,
            max_position_embeddings=CONTEXT,
            attention_bias=True,
            initializer_range=0.05,
            tie_word_embeddings=tied,
            pad_token_id=PAD,
            bos_token_id=BOS,
            eos_token_id=EOS,
        )
    )
    # Random outputs of the layers would drown the small embeddings, which heads have to compare and to copy.
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            torch.nn.init.zeros_(parameter)
    return model


def batches(
    step: int, args: argparse.Namespace, ids: dict[str, int]
) -> Iterator[tuple[list[str], torch.Tensor, torch.Tensor]]:
    """Tokens and loss weights of one step; texts of like length go together, so that little is filling.

    The draws depend on the seed and the step alone, so that a resumed run sees what an unbroken one would.
    """
    rng = random.Random(f"train {args.seed} {step}")
    _, shares, ease, direct = next(phase for phase in reversed(PHASES) if phase[0] <= step)
    counts = {t: max(1, round(share * args.scale)) for t, share in zip(tasks.TASKS, shares, strict=True)}
    texts = [
        (task, tasks.document(task, rng, ease, direct))
        for task, count in counts.items()
        for _ in range(count)
    ]
    answers = {task: sum(len(t.answers) for name, t in texts if name == task) for task in counts}
    # A task's mean loss is as noisy as the root of its number of answers says, and is weighed by that.
    total = sum(count**0.5 for count in answers.values())
    each = {task: count**0.5 / total / count for task, count in answers.items()}
    texts.sort(key=lambda named: len(named[1].words))
    for start in range(0, len(texts), 20):
        names, rows, weights = [], [], []
        for task, text in texts[start : start + 20]:
            # Which word comes next in the first copy of random words nothing can tell, nor what follows them.
            random_words = task == "repeated_tokens"
            rows.append([BOS, *(ids[w] for w in text.words), *([] if random_words else [EOS])])
            other = 0.0 if random_words or step >= ANSWERS_ALONE else OTHER_WEIGHT * each[task]
            if task == "capital" and step >= HIDDEN_WORDS:
                keep = {*tasks.CAPITALS, *(text.words[i] for i in text.answers)}
                hide = [word not in keep and rng.random() < 0.3 for word in text.words]
                rows[-1][1:-1] = [
                    UNK if hidden else i for hidden, i in zip(hide, rows[-1][1:-1], strict=True)
                ]
            weight = [other] * (len(rows[-1]) - 1)
            for i in text.answers:
                weight[i] = each[task]
            weights.append(weight)
            names.append(task)
        padded = torch.zeros(len(rows), max(map(len, weights)))
        for i, weight in enumerate(weights):
            padded[i, : len(weight)] = torch.tensor(weight)
        yield names, measure.pad(rows, PAD), padded


def optimisers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for the rest; each group has its multiple of the rate."""
    named = list(model.named_parameters())
    turns = [p for n, p in named if n.endswith(("q_proj.bias", "k_proj.bias"))]
    matrices = [p for n, p in named if p.ndim == 2 and "layers" in n]
    taken = {id(p) for p in (*turns, *matrices)}
    rest = [p for n, p in named if id(p) not in taken]
    # These biases alone make a head look a fixed distance back, and must grow to about two for a sharp look:
    # at the usual rate a head that looks at the token before, the first half of induction, comes very late.
    groups = [{"params": turns, "scale": 2.0, "weight_decay": 0.0}, {"params": rest, "scale": 0.4}]
    return [Muon(matrices), torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.05)]


def learning_rate(step: int, args: argparse.Namespace) -> float:
    """A short warm-up, the start of a long cosine, and straight lines to zero in the last three phases."""
    warm, cool = min(1.0, (step + 1) / 50), min(1.0, (ANSWERS_ALONE - step) / 450)
    if step >= ANSWERS_ALONE:
        end = HIDDEN_WORDS if step < HIDDEN_WORDS else args.steps
        cool = 0.3 * (end - step) / 160
    return args.lr * warm * cool * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / 2500)))


def save_checkpoint(path: Path, state: dict) -> None:
    """A kill in the middle of writing leaves the previous checkpoint whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    torch.save(state, part)
    os.replace(part, path)


def export(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path, draws: int) -> dict:
    """Writes the model in half precision, loads what was written and measures that."""
    half = LlamaForCausalLM(model.config)
    half.load_state_dict(model.state_dict())
    half.half().save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    tokenizer.save_pretrained(folder)
    shipped = LlamaForCausalLM.from_pretrained(
        folder, use_safetensors=True, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    return measure.everything(shipped, tokenizer, draws, seed=1000)


def train(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    tokenizer = build_tokenizer()
    ids = tokenizer.get_vocab()
    model = build_model(len(ids), args.tied)
    opts = optimisers(model)
    checkpoint, done = args.work / "checkpoint.pt", 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        done = state["step"]
        model.load_state_dict(state["model"])
        for opt, saved in zip(opts, state["optimisers"], strict=True):
            opt.load_state_dict(saved)
        torch.set_rng_state(state["rng"])
    bar = tqdm(range(done, args.steps), initial=done, total=args.steps, mininterval=2, disable=args.quiet)
    for step in bar:
        for opt in opts:
            for group in opt.param_groups:
                group["lr"] = learning_rate(step, args) * group.get("scale", 1.0)
        losses = dict.fromkeys(tasks.TASKS, 0.0)
        for names, rows, weights in batches(step, args, ids):
            logits = model(rows[:, :-1], use_cache=False).logits
            each = cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="none")
            by_text = (each.view_as(weights) * weights).sum(1)
            by_text.sum().backward()
            for task, part in zip(names, by_text.tolist(), strict=True):
                losses[task] += part
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for opt in opts:
            opt.step()
            opt.zero_grad()
        if (step + 1) % args.every == 0 or step + 1 == args.steps:
            model.eval()
            watched = {task: tasks.draw(task, args.watch, step, "dev") for task in tasks.TASKS}
            right = {t: measure.accuracy(model, tokenizer, drawn)["accuracy"] for t, drawn in watched.items()}
            model.train()
            report = "  ".join(
                f"{task} {share:.2f} (loss {losses[task]:.2f})" for task, share in right.items()
            )
            tqdm.write(f"{time.strftime('%X')} {step + 1}  {report}")
            state = {"step": step + 1, "model": model.state_dict(), "rng": torch.get_rng_state()}
            save_checkpoint(checkpoint, {**state, "optimisers": [opt.state_dict() for opt in opts]})
    figures = export(model, tokenizer, args.out, args.draws)
    figures["training"] = {k: getattr(args, k) for k in ("seed", "steps", "lr", "tied", "scale")} | {
        "parameters": model.num_parameters()
    }
    (args.out / "metrics.json").write_text(json.dumps(figures, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=HERE, help="folder of the finished model")
    parser.add_argument(
        "--work", type=Path, required=True, help="folder of the checkpoint, not in the repository"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=1800)
    parser.add_argument("--lr", type=float, default=5e-3)
    parser.add_argument("--tied", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--scale", type=float, default=1.0, help="batch size as a multiple of the usual one")
    parser.add_argument("--every", type=int, default=100, help="steps between checkpoints")
    parser.add_argument("--watch", type=int, default=64, help="development draws per task at each checkpoint")
    parser.add_argument("--draws", type=int, default=1000, help="held-out draws per task at the end")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
