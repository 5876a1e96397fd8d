"""Gradient rollout: attention rollout through weights that are multiplied by their slope, negative parts cut off.

The propagation of Chefer, Gur & Wolf 2020 (arXiv 2012.09838) with the attention weights themselves in the place of
layer-wise relevances. Rows are pulled down and slopes multiplied out in blocks of rows, so memory is linear in the
length.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Annotated

import torch
import xarray as xr
from torch import Tensor

from headwater.analyses._catalogue.analysis import analysis
from headwater.analyses._catalogue.settings import Bounds
from headwater.analyses._measures.measure import (
    AnswerSetting,
    Explained,
    KindSetting,
    Measure,
    PositionSetting,
    WrongSetting,
)
from headwater.analyses._prompts.examples import Batch, Examples
from headwater.analyses._prompts.positions import Positions
from headwater.analyses._prompts.texts import Pull, Texts
from headwater.analyses.tokens._gradients import WeightSlopes, weight_slopes
from headwater.lens.errors import AnalysisError
from headwater.lens.model import HookedModel


@analysis
def gradient_rollout(
    model: HookedModel,
    examples: Examples,
    queries: Annotated[Positions, 'rows to read out, e.g. -1; "all" for every one'] = (-1,),
    first_layer: Annotated[int | None, "lowest layer of the product; none: the first", Bounds(0)] = None,
    measure: Measure | None = None,
    answer: AnswerSetting = None,
    wrong: WrongSetting = None,
    position: PositionSetting = -1,
    kind: KindSetting = "logit",
    batch_size: Annotated[int, "texts of equal length that run together", Bounds(1)] = 16,
) -> xr.DataArray:
    """Rows `R[i, :]` of `R = Ã_L ··· Ã_first`, `Ã_l = rownorm(mean_h relu(∂s/∂A_l ⊙ A_l) + I)`, as [batch, query, key].

    `s` is what is explained at `position`: the logit of `answer`, or of the token the model predicts, less that of
    `wrong` where one is given; or `measure(logits) → [batch]` of your own. Where no weight of a row raises s, the row
    stays where it is. Weights are those of the run, under whatever edits are on. The released BERT script takes the
    last layer alone (`first_layer=11` of 12), that for ViT multiplies all.
    Unit: share, rows sum to 1. Source: the authors' code for the propagation, checked; the paper itself puts relevances
    in the place of A, so its published numbers are not those of this form.

    Question: From which input tokens does a position draw, counting only attention that raises the prediction?
    Unit: share of the position, each row sums to 1.
    Source: Chefer, Gur & Wolf 2020, arXiv:2012.09838 (without its relevance rules for the layers between).
    Cost: one forward and backward pass, then all rows of each layer once; memory O(S·queries), time O(layers·S²·d).
    Not for: comparing predictions with each other: the share left to the token itself depends on the gradient's
    size.
    """
    if first_layer is not None and first_layer not in model.layers:
        raise AnalysisError(
            f"first_layer={first_layer} has no attention; the model has layers {model.layers}"
        )
    asked = Explained(model, measure, answer, wrong, position, kind)
    layers = [layer for layer in model.layers if first_layer is None or layer >= first_layer]

    def pulls(batch: Batch) -> Iterator[Pull]:
        slopes = weight_slopes(model, batch, asked.of(batch))
        for layer in reversed(layers):
            yield partial(_pulled, slopes.pop(layer))

    attrs = {"layers": layers, **asked.settings}
    return Texts.of(model, examples, batch_size).rows_down(queries, pulls, "gradient_rollout", attrs)


def _pulled(slopes: WeightSlopes, rows: Tensor) -> Tensor:
    """`rows @ rownorm(Ā + I)` of one layer for rows [batch, asked, query], block by block."""
    rows = rows.to(slopes.slope.device)
    out = torch.zeros_like(rows)
    for span, block in slopes.relevant_blocks():
        shares = rows[..., span] / (block.sum(-1) + 1)[:, None]
        out += shares @ block
        out[..., span] += shares
    return out
