"""Max logits: the largest attention score of each head, and how it grows along a text.

Scores that grow without bound make attention one-hot and training unstable; QK-Clip watches this number. It comes from
two row statistics of the maps, the largest weight and the log-sum-exp, so nothing is computed again.
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
import torch
import xarray as xr

from headwater.analyses._catalogue.analysis import analysis
from headwater.analyses._catalogue.settings import Bounds
from headwater.kernels.maps.attention_map import AttentionMap
from headwater.lens.errors import AnalysisError
from headwater.lens.records.record import Record


@analysis
def max_logits(
    record: Record,
    clip: Annotated[float, "largest score that QK-Clip allows", Bounds(0.0, above=True)] = 100.0,
) -> xr.Dataset:
    """`row_max` [batch, layer, head, query]: the largest score of each query, `ln(max_j A_ij) + logsumexp_j`.

    Scores are those of the softmax over visible keys: scaled, with soft cap, biases and edits of scores. `max_logit`
    [layer, head] is the largest of all, and `running` [layer, head, query] the largest of the queries so far in any of
    the texts, so that its growth along the text shows. `factor` [layer, head] is `min(1, clip / max_logit)`, by which
    QK-Clip multiplies queries and keys together. Growth over training shows between the records of checkpoints. Padding
    is NaN. AnalysisError where the weights are no softmax of scores.

    Question: How large do the attention scores of each head get?
    Unit: score (what the softmax takes, nats).
    Source: max logits and QK-Clip, Kimi K2 (arXiv:2507.20534), with the largest score and not its size.
    Cost: none beyond the record's statistics.
    Not for: how sharp attention is, since what is common to a row does not count (row_support, entropy); which heads
    matter; a bound on other texts.

    >>> import headwater as hw
    >>> record = hw.load("tasks-4l").record("When Mary and John went to the store")
    >>> found = hw.analyses.max_logits(record)
    >>> bool((found.running[..., -1] == found.max_logit).all()), float(found.factor.min())
    (True, 1.0)
    """
    for layer in record.layers:
        map = record.map(layer)
        if not isinstance(map, AttentionMap) or map.rule.normaliser is not None or map.steps:
            raise AnalysisError(
                f"the weights of layer {layer} are no softmax of scores as they are (another normaliser, or edited "
                "weights), so their largest score is not known from them"
            )
    top, lse = (torch.from_numpy(record.statistic(name).values).double() for name in ("max", "lse"))
    rows = (top.log() + lse).masked_fill(~record.valid[:, None, None], torch.nan)
    least = rows.nan_to_num(nan=-torch.inf)
    largest = least.amax((0, 3))
    running = least.amax(0).cummax(-1).values
    running = running.masked_fill(torch.isinf(running), torch.nan)
    return xr.Dataset(
        {
            "row_max": (("batch", "layer", "head", "query"), rows.numpy()),
            "max_logit": (("layer", "head"), largest.numpy()),
            "running": (("layer", "head", "query"), running.numpy()),
            "factor": (("layer", "head"), (clip / largest.clamp_min(clip)).numpy()),
        },
        coords={
            "layer": record.layers,
            "head": np.arange(record.n_heads),
            "token": (("batch", "query"), np.array(record.strings, dtype=object).astype(str)),
        },
    )
