"""Input gradient: how steeply a prediction changes with each input token's word embedding.

Simonyan, Vedaldi & Zisserman 2013 (arXiv 1312.6034) for images; the sum over the embedding as Abnar & Zuidema 2020
(arXiv 2005.00928) use it. One forward and one backward pass.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
import xarray as xr

from headwater.analyses._catalogue.analysis import analysis
from headwater.analyses._catalogue.settings import Bounds
from headwater.analyses._measures.measure import (
    AnswerSetting,
    Explained,
    KindSetting,
    Measure,
    PositionSetting,
    WrongSetting,
    embedded_tokens,
)
from headwater.analyses._prompts.examples import Examples
from headwater.analyses._prompts.texts import Texts
from headwater.analyses.tokens._gradients import input_slopes
from headwater.lens.errors import AnalysisError
from headwater.lens.model import HookedModel

ROUNDING = 1e-4  # a sum below this part of its terms is rounding


@analysis
def input_gradient(
    model: HookedModel,
    examples: Examples,
    reduce: Annotated[Literal["norm", "sum"], "how the slopes of an embedding become one number"] = "norm",
    measure: Measure | None = None,
    answer: AnswerSetting = None,
    wrong: WrongSetting = None,
    position: PositionSetting = -1,
    kind: KindSetting = "log_probability",
    batch_size: Annotated[int, "texts of equal length that run together", Bounds(1)] = 16,
) -> xr.DataArray:
    """`g[j] = ‖∂s/∂e_j‖₂` at the word embeddings e, as [batch, key]; `reduce="sum"`: `|Σ_d ∂s/∂e_jd|`.

    The sum is what Abnar & Zuidema take. A model that reads its stream through LayerNorms alone (GPT-2, BERT) never
    notices a shift of all components, so there the sum is 0 whatever the text is, and it is refused.
    `s` is `kind` of `answer` (or of the token that the model predicts), less that of `wrong` where one is given, at
    `position`; or `measure(logits) → [batch]` of your own. Positions are embedded apart and stay as they are.
    Unit: that of s per unit of embedding. Source: the code of Abnar & Zuidema, checked; the norm from memory.

    Question: To which input token does the prediction react most, for small changes?
    Unit: change of what is explained per unit of embedding.
    Source: Simonyan, Vedaldi & Zisserman 2013, arXiv:1312.6034; Abnar & Zuidema 2020, arXiv:2005.00928.
    Cost: one forward and backward pass.
    Not for: what happens when a token is taken away: the slope may be flat where the answer is sure.
    """
    asked = Explained(model, measure, answer, wrong, position, kind)
    texts = Texts.of(model, examples, batch_size)
    found = texts.empty()
    for batch in texts.batches:
        value = asked.of(batch)
        slope, _ = input_slopes(
            model, embedded_tokens(model, batch.ids), value, torch.arange(len(batch.places))
        )
        slope = slope.double()
        total = slope.sum(-1).abs()
        if reduce == "sum" and (total <= ROUNDING * slope.abs().sum(-1)).all() and slope.any():
            raise AnalysisError(
                f"{model.name} does not notice a shift of all components of an embedding, so slopes sum to 0; "
                'use reduce="norm"'
            )
        texts.spread(batch, total if reduce == "sum" else slope.norm(dim=-1), found)
    attrs = {"reduce": reduce, **asked.settings}
    return texts.by_key(found, "input_gradient", attrs)
