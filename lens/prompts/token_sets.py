"""Measures for tasks with a set of right answers, such as every year above a start.

A measure is a function from logits [pair, position, vocab] to one number per pair, [pair]. `patch`, `path_patch` and
`edge_attribution` accept it. They call it once per batch, so sets that differ between pairs need all pairs in one
batch: prompts of one length, and a `batch_size` of at least the number of pairs.
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
Measure = Callable[[Float[Tensor, "pair position vocab"]], Float[Tensor, " pair"]]


def years_measure(examples: Sequence[Any], tokenizer: Any, kind: Kind = "probability") -> Measure:
    r"""Greater-than: P(years above the start) - P(years up to the start), by Hanna et al. 2023 (from memory).

    `examples` come from `prompt_set("greater_than", …)`. `kind="logit"` (ours) is the mean logit of the years above
    minus the mean logit of the others. For tokenizers of single digits the answers are decades: those above the start's
    less those below it, and the start's own counts on neither side.

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
    right: Sequence[Sequence[int]], wrong: Sequence[Sequence[int]], kind: Kind = "probability",
    position: int = -1,
) -> Measure:  # fmt: skip
    """A measure: `Σ_right p - Σ_wrong p` at a position, or with `kind="logit"` the difference of mean logits.

    `right` and `wrong` hold one set of token ids for each pair, or a single set for all pairs. The measure is
    differentiable. It raises PromptError for logits of another number of pairs.

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

    def over_sets(logits: Float[Tensor, "pair position vocab"]) -> Float[Tensor, " pair"]:
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
