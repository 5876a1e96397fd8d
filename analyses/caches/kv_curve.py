"""What a cache of fewer keys costs: the loss of the last part of a text when keys of its first part are evicted.

Keys are ranked by the scores of `kv_scores` of the first part alone and evicted once it has been read, as released
methods do: the first part sees all of itself, the last part what was kept and itself.
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from headwater.analyses._catalogue.analysis import analysis
from headwater.analyses._catalogue.settings import BatchSize, Bounds, Seed
from headwater.analyses._prompts.examples import Examples, batches_of
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
from headwater.lens.naming.tokens import Tokens
from headwater.lens.progress import progress


@analysis
def kv_curve(
    model: HookedModel,
    examples: Examples,
    kept: Kept = "0.1, 0.25, 0.5",
    first: Annotated[float, "share of the text whose keys are evicted", Bounds(0.0, 1.0, above=True)] = 0.5,
    window: Window = 64,
    pool: Pool = 5,
    future: Future = 512,
    sinks: Sinks = 4,
    draws: Draws = 3,
    seed: Seed = 0,
    batch_size: BatchSize = 1,
) -> xr.Dataset:
    """`loss` [by, kept, batch]: nats per token of the last part, when a share of the first part's keys is kept.

    Every key–value head keeps `kept·keys` keys, rounded down. "observed" and "windowed" keep the largest of that score
    of `kv_scores`, "expected" of its `by_value`; "critical" keeps half of them by "windowed" and the rest by its
    `by_output`, as CriticalKV does over SnapKV. The controls: "recent" keeps the last keys, "random" others in each
    head and draw. `whole` [batch] is the loss with all keys, and `excess` [by, kept] the mean of `loss - whole` over
    the texts; `random_range` [end, kept] are the least and the largest excess of the draws. Tokens keep their
    positions. The first token of the last part is told by the first part and not counted. AnalysisError where a method
    would have to drop what it always keeps, and as in `kv_scores`.

    Question: What does a cache of fewer keys cost?
    Unit: nats per token.
    Source: ours; scores and selection as released in kvpress (NVIDIA), as in kv_scores.
    Cost: one pass over the first part and one with its record, and one of the last part per way, share and draw;
    memory that of the last part's logits.
    Not for: speed or memory of a real cache, nothing is freed; a ranking of methods from few texts.

    >>> import headwater as hw
    >>> model = hw.load("tasks-4l")
    >>> text = "When Mary and John went to the store , John gave a drink to"
    >>> found = hw.analyses.kv_curve(model, text, kept="0.5, 1", window=2, sinks=1)
    >>> found.excess.shape, bool((abs(found.excess.sel(kept=1)) < 1e-5).all())
    ((6, 2), True)
    """
    refuse_without_cache(model)
    if not model.has_lm_head:
        raise AnalysisError(f"{model.name} predicts no next token, so evicted keys have no loss")
    shares = shares_of(kept)
    batches = batches_of(model, examples, batch_size)
    count = sum(len(batch.places) for batch in batches)
    runs = (*RULES, *(f"random {n}" for n in range(draws)))
    losses = torch.full((len(runs), len(shares), count), torch.nan, dtype=torch.float64)
    whole = torch.full((count,), torch.nan, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    with progress(total=len(batches) * len(shares) * len(runs), desc="evicted keys", unit="run") as bar:
        for batch in batches:
            if isinstance(batch.ids, Tokens) and batch.ids.more:
                raise AnalysisError(
                    "kv_curve reads texts alone; give examples without pictures or other inputs"
                )
            ids = batch.ids.as_subclass(Tensor)
            length = int(first * ids.shape[1])
            if not length or length > ids.shape[1] - 2:
                raise AnalysisError(f"first={first:g} leaves no two tokens of a text to be told")
            refuse_few(shares, length, window, sinks)
            scores = kv_scores(
                model, ids[:, :length], window=window, pool=pool, future=future, sinks=sinks,
                batch_size=batch_size,
            )  # fmt: skip
            behind = Behind.of(model, ids, length)
            whole[batch.places] = behind.loss().mean(-1)
            for column, share in enumerate(shares):
                ways = kept_by(scores, count_of(share, length), draws, generator)
                for row, (_, chosen) in enumerate(ways):
                    losses[row, column, batch.places] = behind.loss(chosen).mean(-1)
                    bar.update()
    drawn = (losses[len(RULES) :] - whole).mean(-1)
    loss = torch.cat([losses[: len(RULES)], losses[len(RULES) :].mean(0, keepdim=True)])
    return xr.Dataset(
        {
            "loss": (("by", "kept", "batch"), loss.numpy()),
            "whole": ("batch", whole.numpy()),
            "excess": (("by", "kept"), (loss - whole).mean(-1).numpy()),
            "random_range": (("end", "kept"), torch.stack([drawn.amin(0), drawn.amax(0)]).numpy()),
        },
        coords={
            "by": list(WAYS), "kept": shares, "batch": np.arange(count), "end": ["least", "largest"],
        },
    )  # fmt: skip
