"""Gradient rollout: attention rollout through weights times their gradient, with negative products set to 0.

It is the propagation of Chefer, Gur & Wolf 2020 (arXiv 2012.09838) with attention weights in the place of the paper's
layer-wise relevances. Rows are pulled down and gradients multiplied out in blocks of rows, so memory is linear in the
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
from headwater.analyses._catalogue.settings import BatchSize, Bounds
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
from headwater.analyses._streams.between_layers import refuse_crossing, refuse_mixers
from headwater.analyses.tokens._gradients import WeightSlopes, predicting, weight_slopes
from headwater.analyses.tokens._sinks_aside import one_token_of_product
from headwater.lens.errors import AnalysisError
from headwater.lens.model import HookedModel


@analysis
def gradient_rollout(
    model: HookedModel,
    examples: Examples,
    queries: Annotated[
        Positions | None, 'rows to read out, e.g. -1; "all" for every one; none: the one that predicts'
    ] = None,
    first_layer: Annotated[int | None, "lowest layer of the product; none: the first", Bounds(0)] = None,
    measure: Measure | None = None,
    answer: AnswerSetting = None,
    wrong: WrongSetting = None,
    position: PositionSetting = -1,
    kind: KindSetting = "logit",
    batch_size: BatchSize = 16,
) -> xr.DataArray:
    """Rows `R[i, :]` of `R = Ã_L ··· Ã_first`, `Ã_l = rownorm(mean_h relu(∂s/∂A_l ⊙ A_l) + I)`, as [batch, query, key].

    `s` is `kind` of `answer` (none: the token that the model predicts for the text), less that of `wrong` if one is
    given, at `position`; or a `measure(logits) → [batch]` of the caller. Without `queries` the row is read that
    predicts, as in `relevance`. A row keeps its own position where none of its
    weights raises s. Weights are those of the run under the active edits. The released BERT script takes the last layer
    alone (`first_layer=11` of 12), the script for ViT multiplies all.

    Question: From which input tokens does a position draw, counting only attention that raises the prediction?
    Unit: share of the position, each row sums to 1.
    Source: Chefer, Gur & Wolf 2020, arXiv:2012.09838 (without its relevance rules for the layers between, so its
    published numbers are not of this form); propagation held to the authors' code.
    Cost: one forward and backward pass, then all rows of each layer once; memory O(S·queries), time O(layers·S²·d).
    Not for: comparing predictions with each other: the share left to the token itself depends on the gradient's size.

    >>> import headwater as hw
    >>> model = hw.load("tasks-4l")
    >>> prompt = "When Mary and John went to the store , John gave a drink to"
    >>> found = hw.analyses.gradient_rollout(model, prompt, answer="Mary", wrong="John")
    >>> found.key_token.values[0, found[0, 0, :-1].values.argmax()].item()  # beside the position itself
    'and'
    """
    if first_layer is not None and first_layer not in model.layers:
        raise AnalysisError(
            f"first_layer={first_layer} has no attention; the model has layers {model.layers}"
        )
    refuse_mixers(model.name, model.mixers, "gradient_rollout", first_layer)
    refuse_crossing(model, "gradient_rollout")
    asked = Explained(model, measure, answer, wrong, position, kind, of_classes=True)
    layers = [layer for layer in model.layers if first_layer is None or layer >= first_layer]

    def pulls(batch: Batch) -> Iterator[Pull]:
        slopes = weight_slopes(model, batch, asked.of(batch))
        for layer in reversed(layers):
            yield partial(_pulled, slopes.pop(layer))

    texts = Texts.of(model, examples, batch_size)
    rows: Positions = [predicting(asked, texts.batches)] if queries is None else queries
    found = one_token_of_product(texts.rows_down(rows, pulls, "gradient_rollout"), texts, model.causal)
    return found.assign_attrs(layers=layers, queries=rows)


def _pulled(slopes: WeightSlopes, rows: Tensor) -> Tensor:
    """`rows @ rownorm(Ā + I)` of one layer for rows [batch, asked, query], block by block."""
    rows = rows.to(slopes.slope.device)
    out = torch.zeros_like(rows)
    for span, block in slopes.relevant_blocks():
        shares = rows[..., span] / (block.sum(-1) + 1)[:, None]
        out += shares @ block
        out[..., span] += shares
    return out
