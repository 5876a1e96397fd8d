"""Image compression: are a few image tokens, with a question that has read the picture, enough for the next question?

The use that Kaduri et al. (CVPR 2025) make of their findings: of a picture only the most attended tokens are kept, and
the words of a first question, which carry what it gathered.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from headwater.analyses._catalogue.analysis import analysis
from headwater.analyses._catalogue.settings import Bounds, Draws, Seed
from headwater.analyses._measures.bootstrap import interval
from headwater.analyses._prompts.answers import Answered, Answers, answer_logits, answered, ids_of
from headwater.analyses._prompts.examples import Examples
from headwater.lens.edits.scores import Knockout
from headwater.lens.errors import AnalysisError
from headwater.lens.model import HookedModel
from headwater.lens.naming.tokens import Tokens
from headwater.lens.progress import progress
from headwater.lens.running.written import written_behind

KINDS = ("kept", "alone", "random")


@analysis
def image_compression(
    model: HookedModel,
    examples: Examples,
    further: Annotated[
        str | Sequence[Any] | None, "words of the next question; none: the first again"
    ] = None,
    answers: Answers = None,
    keep: Annotated[str, "numbers of image tokens that are kept, with commas between"] = "0, 1, 2, 4, 8, 16",
    length: Annotated[int, "tokens of the answer to the first question at most", Bounds(1)] = 1,
    controls: Annotated[int, "draws of random image tokens", Bounds(1)] = 3,
    draws: Draws = 2000,
    seed: Seed = 0,
) -> xr.Dataset:
    """Accuracy on `further` questions that see K image tokens, and the first question with its answer, of each picture.

    `examples` are pictures with a first question, to which the model writes its own answer. The tokens that write it
    choose the K image tokens with the most attention, summed over heads and layers. `further` are the words of the next
    question (texts or ids, one for all or one for each), whose tokens can attend to these K and to all words; `answers`
    are the right answers to it. Dataset [kind, kept], `accuracy` with 95 % bounds: "kept" as said, "alone" without the
    first question and its answer too, "random" with K image tokens at random; `gap` [kept] is kept minus random; and
    `plain_accuracy` with all of the picture. Without `further` the first question is asked again; without `answers`
    the model's own answers with the whole picture are right.

    Question: How few image tokens answer the next question about a picture?
    Unit: share of answers of which each token is the likeliest, 0 to 1.
    Source: Kaduri, Bagon & Dekel, CVPR 2025, from its abstract and a summary; how attention is summed is ours.
    Cost: per example one generation, one recording, and a pass for each K, kind and control.
    Not for: speed: the tokens are hidden, not removed; models that were never asked two questions.

    >>> import headwater as hw
    >>> from headwater.lens.loading import zoo
    >>> model = hw.load(zoo.build("llava"))  # random weights
    >>> given = zoo.inputs("llava", lengths=(11, 11))
    >>> prompts = model.to_tokens(given["input_ids"], pixel_values=given["pixel_values"])
    >>> found = hw.analyses.image_compression(model, prompts, [4, 5, 6], keep="0, 9", controls=1)
    >>> found.accuracy.sel(kind="kept", kept=9).item()  # all nine image tokens
    1.0
    """
    counts = _counts(keep)
    first = answered(model, examples, None, length)
    count = len(first)
    words = [None] * count if further is None else ids_of(model, further, count, "further")
    right = [None] * count if answers is None else ids_of(model, answers, count, "answers")
    found = np.full((len(KINDS), len(counts), count), np.nan)
    plain = np.full(count, np.nan)
    generator = torch.Generator().manual_seed(seed)
    for batch in progress(first, desc="image compression", unit="text"):
        place, end = batch.places[0], batch.tokens.shape[1]
        if counts[-1] > len(batch.image):
            raise AnalysisError(f"keep={counts[-1]}, but example {place} has {len(batch.image)} image tokens")
        asked = words[place] or batch.tokens.ids[0, batch.image[-1] + 1 : batch.prompt].tolist()
        whole = written_behind(model.hf, batch.tokens, asked)
        answer = (
            right[place]
            or answer_logits(model, written_behind(model.hf, whole, [0]), whole.shape[1] - 1)[0]
            .argmax(-1)
            .tolist()
        )
        whole = written_behind(model.hf, whole, answer)
        best = [batch.image[n] for n in _looked(model, batch).argsort(descending=True).tolist()]
        said = [n for n in range(end) if n > batch.image[-1]]
        reading = [*range(end, whole.shape[1])]
        plain[place] = _right(model, whole, len(answer), reading, [[]])[0]
        drawn = [torch.randperm(len(best), generator=generator).tolist() for _ in range(controls)]
        for k, size in enumerate(counts):
            hidden = [best[size:], best[size:] + said, *([best[n] for n in order[size:]] for order in drawn)]
            exact = _right(model, whole, len(answer), reading, hidden)
            found[:, k, place] = exact[0], exact[1], np.mean(exact[2:])
    parts = interval(np.moveaxis(found, -1, 0), draws, seed)
    gap = interval((found[0] - found[2]).T, draws, seed)
    whole_ = interval(plain, draws, seed)
    ends = ("", "_low", "_high")
    return xr.Dataset(
        {f"accuracy{end}": (("kind", "kept"), part) for end, part in zip(ends, parts, strict=True)}
        | {f"gap{end}": ("kept", part) for end, part in zip(ends, gap, strict=True)}
        | {f"plain_accuracy{end}": part for end, part in zip(ends, whole_, strict=True)},
        coords={"kind": list(KINDS), "kept": counts},
        attrs={"examples": count, "answers": "the model's own" if answers is None else "given"},
    )


def _counts(given: str) -> list[int]:
    try:
        found = sorted({int(each) for each in str(given).split(",")})
    except ValueError:
        found = [-1]
    if found[0] < 0:
        raise AnalysisError(f"keep={given!r}; give numbers of tokens from 0, as in '0, 4, 16'")
    return found


def _looked(model: HookedModel, batch: Answered) -> Tensor:
    """Attention on each image token of the tokens that write the answer, summed over these, heads and layers."""
    record = model.record(batch.tokens, statistics=())
    rows = slice(batch.prompt - 1, batch.tokens.shape[1] - 1)
    keys = slice(0, batch.tokens.shape[1])
    tiles = (record.map(layer).tile(rows, keys)[0, :, :, batch.image] for layer in record.layers)
    return torch.stack([tile.double().sum((0, 1)).cpu() for tile in tiles]).sum(0)


def _right(
    model: HookedModel, tokens: Tokens, count: int, queries: list[int], hidden: list[list[int]]
) -> list[float]:
    """1 where each of the last `count` tokens is the likeliest, while `queries` do not see these tokens; for each."""
    copies = tokens.rows(torch.zeros(len(hidden), dtype=torch.long))
    edits = [Knockout(queries, some, rows=[n]) for n, some in enumerate(hidden) if some]
    with model.edit(*edits):
        logits = answer_logits(model, copies, tokens.shape[1] - count - 1)
    return (logits.argmax(-1) == tokens.ids[0, -count:].cpu()).all(-1).double().tolist()
