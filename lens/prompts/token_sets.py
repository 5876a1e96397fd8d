"""Measures of the logits over sets of tokens: what is right may be any of many, as every year above a start is.

A measure is a function of logits [pair, position, vocab] that gives one number per pair, as `patch`, `path_patch` and
`edge_attribution` take it. They call it with the pairs of one batch, so sets that differ from pair to pair need all
pairs in one: prompts of one length, and `batch_size` at least their number where there is such a setting.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from headwater.data.prompts.texts import YearExample
from headwater.lens.errors import PromptError
from headwater.lens.prompts.prompt_sets import year_tokens

Kind = Literal["probability", "logit"]
Measure = Callable[[Float[Tensor, "pair position vocab"]], Float[Tensor, "pair"]]


def years_measure(examples: Sequence[Any], tokenizer: Any, kind: Kind = "probability") -> Measure:
    r"""Greater-than: probability of all years above the start less that of all up to it (Hanna et al. 2023, memory).

    `kind="logit"`, ours: the mean logit of the ones less that of the others.

    >>> import re, torch
    >>> import headwater as hw
    >>> ids = {}
    >>> def tokenizer(text, **options):  # one token for each word and each two digits
    ...     words = re.findall(r"\d\d|[a-z]+", text.lower())
    ...     return {"input_ids": [ids.setdefault(word, len(ids)) for word in words]}
    >>> examples = hw.prompt_set("greater_than", n=2, tokenizer=tokenizer)
    >>> measure = hw.years_measure(examples, tokenizer)
    >>> measure(torch.zeros(2, 9, len(ids))).shape  # one number for each example
    torch.Size([2])
    """
    wrong = [place for place, example in enumerate(examples) if not isinstance(example, YearExample)]
    if wrong or not examples:
        raise PromptError("years_measure takes examples of prompt_set('greater_than', …) alone, at least one")
    sides = [year_tokens(tokenizer, example) for example in examples]
    return sets_measure([right for right, _ in sides], [other for _, other in sides], kind)


def sets_measure(
    right: Sequence[Sequence[int]],
    wrong: Sequence[Sequence[int]],
    kind: Kind = "probability",
    position: int = -1,
) -> Measure:
    """`Σ_right p - Σ_wrong p` at a position, or the difference of mean logits.

    Sets of tokens are given for each pair, or one for all. The measure has gradients, and refuses logits of another
    number of pairs than it has sets.

    >>> import headwater as hw
    >>> model = hw.load("tasks-4l")
    >>> mary, john = (int(model.to_tokens(name)[0, -1]) for name in ("Mary", "John"))
    >>> measure = hw.sets_measure(right=[[mary]], wrong=[[john]])
    >>> measure(model("When Mary and John went to the store , John gave a drink to")).round(decimals=1)
    tensor([1.])
    """
    if kind not in ("probability", "logit"):
        raise PromptError(f"kind={kind!r} is unknown; give probability or logit")
    if len(right) != len(wrong) or not right:
        raise PromptError(
            f"there are {len(right)} right and {len(wrong)} wrong sets; give as many of both, one or more"
        )
    empty = [place for place, sets in enumerate(zip(right, wrong, strict=True)) if not all(map(len, sets))]
    if empty:
        raise PromptError(f"set {empty[0]} holds no token; give one or more right and wrong tokens")

    def over_sets(logits: Float[Tensor, "pair position vocab"]) -> Float[Tensor, "pair"]:
        row = logits[:, position]
        row = row if row.dtype == torch.float64 else row.float()
        if len(right) not in (1, len(row)):
            raise PromptError(
                f"the measure has sets for {len(right)} pairs and got {len(row)}; give it prompts of one length and "
                f"batch_size={len(right)}"
            )
        values = row.softmax(-1) if kind == "probability" else row
        weights = row.new_zeros(len(right), row.shape[-1])
        for place, (ones, others) in enumerate(zip(right, wrong, strict=True)):
            for tokens, sign in ((ones, 1.0), (others, -1.0)):
                weights[place, list(tokens)] = sign / (len(tokens) if kind == "logit" else 1)
        return (values * weights).sum(-1)

    over_sets.__name__ = f"{kind} of right less wrong tokens"
    return over_sets
