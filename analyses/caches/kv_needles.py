"""Needle tests on a cache of fewer keys: whether a model still tells a sentence of a text whose keys were evicted.

The text is read and its keys are evicted before the question is asked, so that no method knows what it will be asked.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from headwater.analyses._catalogue.analysis import analysis
from headwater.analyses._catalogue.settings import Bounds
from headwater.analyses._prompts.needles import Material, Needle, lengths_of, material_of, needles
from headwater.analyses.caches._evicted_keys import (
    RULES,
    WAYS,
    Behind,
    Draws,
    Kept,
    count_of,
    kept_by,
    refuse_few,
    shares_of,
)
from headwater.analyses.caches.kv_scores import Future, Pool, Sinks, Window, kv_scores, refuse_without_cache
from headwater.lens.errors import AnalysisError
from headwater.lens.model import HookedModel
from headwater.lens.progress import progress

KEYS = 2**15  # keys of all rows in one run


@analysis
def kv_needles(
    model: HookedModel,
    lengths: Annotated[int | Sequence[int], "tokens of the prompts"] = 512,
    depths: Annotated[int, "places of the needle, evenly from the beginning to the end", Bounds(1)] = 5,
    tests: Annotated[int, "needles for every length and depth", Bounds(1)] = 1,
    material: Annotated[Material | None, "sentences or random tokens; none: what the tokenizer can"] = None,
    kept: Kept = "0.1, 0.25, 0.5",
    window: Window = 64,
    pool: Pool = 5,
    future: Future = 512,
    sinks: Sinks = 4,
    draws: Draws = 3,
    seed: Annotated[int, "seed of needles, texts and random keys", Bounds(0)] = 0,
) -> xr.Dataset:
    """`loss` and `recall` [by, kept, length, depth] of a needle's answer, when a share of the text's keys is kept.

    The text in front of the question is read, its keys are ranked and evicted as in `kv_curve`, and then question and
    answer follow. `loss` is nats per token of the right answer; `recall` is the share of its tokens that are the
    likeliest one after the right tokens before, 0 to 1: at 1 greedy decoding writes the answer. `whole_loss` and
    `whole_recall` [length, depth] are with all keys. Values are means over tests, of "random" also over draws;
    `random_range` [end, kept] are the least and largest mean recall of the draws. Texts and needles are those of
    `retrieval_heads`; the question ends with the needle's first words. AnalysisError as in `kv_curve`.

    Question: Does a model still tell a sentence from a cache of fewer keys?
    Unit: nats per token (loss); share of the answer's tokens, 0 to 1 (recall).
    Source: ours; needles as in retrieval_heads (Wu et al. 2024, arXiv:2404.15574), scores and selection as released in
    kvpress (NVIDIA).
    Cost: one pass over the text and one with its record, and one of question and answer per way, share and draw.
    Not for: speed or memory of a real cache, nothing is freed; methods that know the question; a ranking of methods
    from few tests; models that do not pass with all keys.

    >>> import headwater as hw
    >>> model = hw.load("tasks-4l")
    >>> found = hw.analyses.kv_needles(model, 60, depths=2, kept="0.5, 1", window=2, sinks=1, draws=1)
    >>> found.loss.dims, bool((abs(found.loss.sel(kept=1) - found.whole_loss) < 1e-5).all())
    (('by', 'kept', 'length', 'depth'), True)
    """
    refuse_without_cache(model)
    if not model.has_lm_head:
        raise AnalysisError(f"{model.name} predicts no next token, so it gives no answer")
    shares, material = shares_of(kept), material or material_of(model)
    sizes, places = lengths_of(lengths), np.linspace(0, 1, depths).tolist()
    generator = torch.Generator().manual_seed(seed)
    rows = 1 + len(shares) * (len(RULES) + draws)
    found = torch.zeros(2, rows, len(sizes), len(places), dtype=torch.float64)
    total = len(sizes) * len(places) * tests
    for length, depth, test in progress(
        needles(model, sizes, places, tests, material, seed), desc="needles", unit="test", total=total
    ):
        test.fits(model)
        refuse_few(shares, test.question.start, window, sinks)
        scores = kv_scores(
            model, test.ids[:, : test.question.start], window=window, pool=pool, future=future, sinks=sinks
        )
        chosen = [torch.ones(scores.value_norm.shape, dtype=torch.bool)]
        for share in shares:
            count = count_of(share, test.question.start)
            chosen += [each for _, each in kept_by(scores, count, draws, generator)]
        found[:, :, sizes.index(length), places.index(depth)] += _answered(model, test, torch.cat(chosen))
    found /= tests
    whole, by_way = found[:, 0], found[:, 1:].unflatten(1, (len(shares), -1)).transpose(1, 2)
    drawn = by_way[:, len(RULES) :]
    loss, recall = torch.cat([by_way[:, : len(RULES)], drawn.mean(1, keepdim=True)], 1).numpy()
    spread = drawn[1].mean((-2, -1))
    dims = ("by", "kept", "length", "depth")
    return xr.Dataset(
        {
            "loss": (dims, loss),
            "recall": (dims, recall),
            "whole_loss": (dims[2:], whole[0].numpy()),
            "whole_recall": (dims[2:], whole[1].numpy()),
            "random_range": (("end", "kept"), torch.stack([spread.amin(0), spread.amax(0)]).numpy()),
        },
        coords={
            "by": list(WAYS), "kept": shares, "length": sizes, "depth": places, "end": ["least", "largest"],
        },
        attrs={"material": material, "tests": total},
    )  # fmt: skip


def _answered(model: HookedModel, test: Needle, chosen: Tensor) -> Tensor:
    """Loss and recall of the answer [2, row], of rows of kept keys [row, layer, kv_head, key]."""
    answer = test.ids[:, test.answer]
    ids = torch.cat([test.ids, answer], 1)
    behind = Behind.of(model, ids, test.question.start)
    parts = []
    for rows in chosen.split(max(KEYS // ids.shape[1], 1)):
        loss, told = (each[:, -answer.shape[1] :].double() for each in behind.told(rows))
        parts.append(torch.stack([loss.mean(-1), told.mean(-1)]))
    return torch.cat(parts, 1)
