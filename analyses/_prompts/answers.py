"""Prompts with a picture and the answers behind them, in batches of rows with pictures and words in the same places."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Annotated, Any

import torch
from torch import Tensor

from headwater.analyses._prompts.examples import Examples, as_tokens, joined, shape_of, singles_of, whole_of
from headwater.lens.errors import AnalysisError
from headwater.lens.model import HookedModel
from headwater.lens.models.classes import logits_of
from headwater.lens.naming.tokens import Tokens
from headwater.lens.running.forward import forward
from headwater.lens.running.written import written_behind

Answers = Annotated[str | Sequence[Any] | None, "answers, one or one for each; none: the model's own"]


@dataclass(frozen=True, eq=False)
class Answered:
    """A batch of prompts with answers of one length, without padding: `tokens` [row, position].

    The first `prompt` positions are the prompt's. `image`, `question` and `answer` are positions: of the picture, of
    the words behind it, and of the tokens that write the answer (the prompt's last one and the answer's but the last).
    """

    tokens: Tokens
    prompt: int
    places: list[int]  # of the rows among the examples
    image: list[int]

    @property
    def words(self) -> Tensor:
        """Ids of the answers, [row, token]."""
        return self.tokens.ids[:, self.prompt :].cpu()

    @property
    def groups(self) -> dict[str, list[int]]:
        behind = [n for n in range(self.prompt - 1) if n > self.image[0] and n not in self.image]
        before = [n for n in range(self.prompt - 1) if n < self.image[0]]
        answer = [*range(self.prompt - 1, self.tokens.shape[1] - 1)]
        return {"image": self.image, "before": before, "question": behind, "answer": answer}


def answered(
    model: HookedModel, examples: Examples, answers: Any = None, length: int = 1, size: int = 1
) -> list[Answered]:
    """The examples with their answers, or with `length` tokens at most that the model itself writes greedily.

    AnalysisError for a model without image tokens, an example without a picture, and answers that do not fit.
    """
    check_reads(model)
    rows = singles_of(model, examples)
    given = [None] * len(rows) if answers is None else ids_of(model, answers, len(rows), "answers")
    kept: dict[Any, list[tuple[int, Tokens, int, list[int]]]] = {}
    for place, (row, answer) in enumerate(zip(rows, given, strict=True)):
        ids = _own(model, row, length) if answer is None else answer
        image = (as_tokens(row).ids[0] == model.image_token).nonzero()[:, 0].tolist()
        if not image or image[-1] == row.shape[1] - 1:
            raise AnalysisError(f"example {place} has no picture with words behind it; give one in its text")
        whole = written_behind(model.hf, as_tokens(row), ids)
        key = shape_of(model, whole), row.shape[1], tuple(image)
        kept.setdefault(key, []).append((place, whole, row.shape[1], image))
    found = []
    for same in kept.values():
        for start in range(0, len(same), size):
            some = same[start : start + size]
            tokens = as_tokens(joined([whole for _, whole, _, _ in some]))
            found.append(Answered(tokens, some[0][2], [place for place, *_ in some], some[0][3]))
    return found


def check_reads(model: HookedModel) -> None:
    """AnalysisError unless the model continues texts that hold pictures."""
    if whole_of(model) is not model or model.image_token is None or not model.causal or not model.has_lm_head:
        raise AnalysisError(
            f"this reads pictures inside of a text that goes on, and {model.name} as {model.part_name!r} has none; "
            "give a model such as LLaVA"
        )
    main = model.parts[model.part_name]
    for part in model.parts.values():
        if part.crosses and part.queries == main.queries:
            raise AnalysisError(
                f"the words of {model.name} look at its pictures in the part {part.name!r}, not as tokens of the text; "
                "give a model such as LLaVA, or edit that part yourself"
            )


def answer_logits(model: HookedModel, tokens: Tokens, first: int) -> Tensor:
    """Logits [row, token, vocab] behind the positions from `first` to the last but one, float32."""
    asked = torch.arange(first, tokens.shape[1] - 1, device=model.device)
    few = "logits_to_keep" in inspect.signature(model.hf.forward).parameters
    logits = logits_of(forward(model, tokens, **({"logits_to_keep": asked} if few else {})))
    assert logits is not None
    return (logits if few else logits[:, asked]).float().cpu()


def read(model: HookedModel, batch: Answered) -> tuple[Tensor, Tensor]:
    """Of each row: the probability of its answer, and whether each of its tokens is the likeliest, float64 [row]."""
    logits = answer_logits(model, batch.tokens, batch.prompt - 1)
    chosen = logits.log_softmax(-1).gather(-1, batch.words[..., None])[..., 0]
    right = (logits.argmax(-1) == batch.words).all(-1)
    return chosen.double().sum(-1).exp(), right.double()


def _own(model: HookedModel, row: Tensor, length: int) -> list[int]:
    """What the model writes behind a row, without the token that ends it unless that is all."""
    ids = model.generate(row, max_new_tokens=length)[0, row.shape[1] :].tolist()
    ends = getattr(model.hf.generation_config, "eos_token_id", None)
    ends = [ends] if isinstance(ends, int) else list(ends or [])
    end = next((n for n, token in enumerate(ids) if token in ends), len(ids))
    return ids[: max(end, 1)]


def ids_of(model: HookedModel, given: Any, count: int, what: str) -> list[list[int]]:
    """Ids of words for each example, from one for all or one for each: texts, ids or lists of ids."""
    alone = isinstance(given, str | Integral)
    flat = (
        isinstance(given, list | tuple)
        and count != len(given)
        and all(isinstance(n, Integral) for n in given)
    )
    each = [given] * count if alone or flat else list(given)
    if len(each) != count:
        raise AnalysisError(f"{what} holds {len(each)} for {count} examples; give one, or one for each")
    found = []
    for place, one in enumerate(each):
        if isinstance(one, str):
            if model.tokenizer is None:
                raise AnalysisError(f"{model.name} has no tokenizer; give {what} as token ids")
            ids = model.tokenizer(one, add_special_tokens=False)["input_ids"]
        else:
            ids = torch.as_tensor(one).reshape(-1).tolist()
        if not ids or not all(isinstance(token, int) and 0 <= token < model.vocab for token in ids):
            raise AnalysisError(f"{what}: example {place} has {one!r:.60}; give words of the vocabulary")
        found.append(ids)
    return found
