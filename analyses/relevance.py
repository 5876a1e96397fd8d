"""Relevance of input tokens to one output: attention weighted by its gradient, added up through the layers.

Chefer, Gur & Wolf 2021 (arXiv 2103.15679), the rule for self-attention, which needs no layer-wise relevance rules. The
rows asked for are pulled down through the layers and each layer's slopes are multiplied out in blocks of rows, so
memory is linear in the length. MLPs and norms take part through the gradient alone.
"""

from __future__ import annotations

from typing import Annotated

import torch
import xarray as xr
from torch import Tensor

from headwater.analyses._about import About
from headwater.analyses._examples import Examples
from headwater.analyses._gradients import WeightSlopes, weight_slopes
from headwater.analyses._measure import (
    AnswerSetting,
    Explained,
    KindSetting,
    Measure,
    PositionSetting,
    WrongSetting,
)
from headwater.analyses._positions import Positions
from headwater.analyses._settings import Bounds
from headwater.analyses._texts import Texts, indicators
from headwater.lens.model import HookedModel
from headwater.lens.record import provenance

ABOUT = About(
    question="Which input tokens does attention carry into this prediction?",
    unit="relevance, from 1 of the token itself upward; only the order within a row has a meaning",
    paper="Chefer, Gur & Wolf 2021, arXiv:2103.15679",
    inputs="model+examples",
    cost="one forward and backward pass, then all rows of each layer once; memory O(S·queries), time O(layers·S²·d)",
    not_for="evidence against an answer (negative parts are cut off); what reaches the answer through MLPs alone",
)


def relevance(
    model: HookedModel,
    examples: Examples,
    queries: Annotated[Positions, 'rows to read out, e.g. -1; "all" for every one'] = (-1,),
    measure: Measure | None = None,
    answer: AnswerSetting = None,
    wrong: WrongSetting = None,
    position: PositionSetting = -1,
    kind: KindSetting = "logit",
    batch_size: Annotated[int, "texts of equal length that run together", Bounds(1)] = 16,
) -> xr.DataArray:
    """Rows `R[i, :]` after `R ← R + Ā_l R` for each layer upward from `R = I`, as [batch, query, key].

    `Ā_l = mean_h relu(∂s/∂A_l ⊙ A_l)`, so `R = (I + Ā_L) ··· (I + Ā_1)`. `s` is what is explained at `position`: the
    logit of `answer`, or of the token the model predicts, less that of `wrong` where one is given; or
    `measure(logits) → [batch]` of your own. Read out the row of the position that predicts (in the paper: CLS). The
    identity is left in: the token of the row itself has 1 more than it receives. Weights are those of the run, under
    whatever edits are on. Self-attention alone: a model with cross-attention is not covered.
    Unit: relevance, no scale; compare tokens within a row. Source: the authors' code, checked.
    """
    asked = Explained(model, measure, answer, wrong, position, kind)
    texts = Texts.of(model, examples, batch_size)
    columns = texts.columns(queries)
    found = texts.empty(columns.shape[1])
    for batch in texts.batches:
        slopes = weight_slopes(model, batch, asked.of(batch))
        rows = indicators(*texts.rows(batch, columns), batch.ids.shape[1])
        for layer in reversed(model.layers):
            own = slopes.pop(layer)
            rows = rows.to(own.slope.device)
            rows = rows + _pulled(own, rows)
        texts.spread(batch, rows, found)
    attrs = ABOUT.attrs(provenance(model), **asked.settings)
    return texts.by_query(found, queries, columns, "relevance", attrs)


def _pulled(slopes: WeightSlopes, rows: Tensor) -> Tensor:
    """`rows @ Ā` of one layer for rows [batch, asked, query], block by block: [batch, asked, key]."""
    out = torch.zeros_like(rows)
    for span, block in slopes.relevant_blocks():
        out += rows[..., span] @ block
    return out
