"""Measurements of a task model: answers over the whole vocabulary, prefix matching, first-token share."""

import random
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
from headwater.data.prompts import tasks

Row = list[int]


def pad(rows: list[Row], pad_id: int) -> torch.Tensor:
    """Rows side by side, filled up on the right: behind a causal mask no real token sees the filling."""
    width = max(map(len, rows))
    return torch.tensor([row + [pad_id] * (width - len(row)) for row in rows])


@torch.no_grad()
def accuracy(model, tokenizer, examples: list[tasks.Example], batch: int = 50) -> dict[str, float]:
    """Share of answers that are the arg-max over the vocabulary; mean logit difference to wrong ones."""
    right, difference = 0, 0.0
    for start in range(0, len(examples), batch):
        part = examples[start : start + batch]
        rows = tokenizer([e.prompt for e in part])["input_ids"]
        logits = model(pad(rows, tokenizer.pad_token_id), use_cache=False).logits.float()
        for line, row, example in zip(logits, rows, part, strict=True):
            last = line[len(row) - 1]
            answer = tokenizer.convert_tokens_to_ids(example.answer)
            wrong = last[tokenizer.convert_tokens_to_ids(list(example.wrong))].mean()
            right += int(last.argmax() == answer)
            difference += (last[answer] - wrong).item()
    count = len(examples)
    return {"accuracy": right / count, "logit_difference": difference / count, "draws": count}


def repeated_rows(tokenizer, count: int, length: int, seed: int) -> torch.Tensor:
    """`<bos>` and the same distinct random words twice, none starting as a training text does."""
    rng = random.Random(f"rows {seed}")
    texts = [tasks.repeated_tokens(rng, "held-out", length).prompt.split()[:length] for _ in range(count)]
    return torch.tensor(tokenizer([" ".join(words + words) for words in texts])["input_ids"])


@torch.no_grad()
def induction(model, tokenizer, count: int, length: int, seed: int) -> float:
    """Share right of the second copy's words from its second word on: the first one nothing determines."""
    rows = repeated_rows(tokenizer, count, length, seed)
    guess = model(rows, use_cache=False).logits.argmax(-1)
    # Column 0 is <bos>; the second copy begins at length + 1.
    return (guess[:, length + 1 : -1] == rows[:, length + 2 :]).float().mean().item()


@torch.no_grad()
def attention(model, rows: torch.Tensor) -> torch.Tensor:
    """Patterns as [layer, row, head, query, key]; the model must run with eager attention."""
    return torch.stack(model(rows, use_cache=False, output_attentions=True).attentions).float()


def prefix_matching(model, tokenizer, count: int, length: int, seed: int) -> torch.Tensor:
    """Per [layer, head]: attention from the second copy to the token after the same word's first place."""
    patterns = attention(model, repeated_rows(tokenizer, count, length, seed))
    queries = torch.arange(length + 1, 2 * length + 1)
    return patterns[:, :, :, queries, queries - length + 1].mean((1, 3))


def first_token_share(model, tokenizer, prompts: list[str]) -> torch.Tensor:
    """Per [layer, head]: mean over all queries of the attention to `<bos>`, averaged over the prompts."""
    shares = []
    for prompt in prompts:
        rows = torch.tensor([tokenizer(prompt)["input_ids"]])
        shares.append(attention(model, rows)[:, 0, :, :, 0].mean(-1))
    return torch.stack(shares).mean(0)


def strongest(scores: torch.Tensor) -> dict[str, float | int]:
    """The head with the highest score."""
    layer, head = divmod(int(scores.argmax()), scores.shape[1])
    return {"layer": layer, "head": head, "score": scores.max().item()}


def everything(model, tokenizer, draws: int, seed: int, split: str = "held-out") -> dict:
    """All figures of metrics.json from one seed."""
    figures: dict = {"seed": seed, "split": split, "tasks": {}}
    for task in tasks.TASKS:
        figures["tasks"][task] = accuracy(model, tokenizer, tasks.draw(task, draws, seed, split))
    for shots in (0, 1):
        rng = random.Random(f"shots {shots} {seed}")
        examples = [tasks.colored_object(rng, split, shots) for _ in range(draws)]
        figures["tasks"][f"colored_object_{shots}_shot"] = accuracy(model, tokenizer, examples)
    rows = max(4, draws // 8)
    figures["induction_accuracy"] = {str(n): induction(model, tokenizer, rows, n, seed) for n in (10, 25, 50)}
    figures["prefix_matching"] = strongest(prefix_matching(model, tokenizer, rows, 25, seed))
    figures["first_token_share"] = {}
    for task in tasks.TASKS:
        prompts = [e.prompt for e in tasks.draw(task, max(4, draws // 10), seed, split)]
        shares = first_token_share(model, tokenizer, prompts)
        figures["first_token_share"][task] = {
            **strongest(shares),
            "share_of_heads_above_0.3": (shares > 0.3).float().mean().item(),
        }
    return figures
