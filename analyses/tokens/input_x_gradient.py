"""Input × gradient: the first-order share of each input token in a prediction.

Shrikumar et al. 2016 (arXiv 1605.01713), at word embeddings. One forward and one backward pass.
"""

from __future__ import annotations

from typing import Annotated

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
from headwater.lens.model import HookedModel


@analysis
def input_x_gradient(
    model: HookedModel,
    examples: Examples,
    signed: Annotated[bool, "keep the sign: above 0 the token speaks for the answer"] = True,
    measure: Measure | None = None,
    answer: AnswerSetting = None,
    wrong: WrongSetting = None,
    position: PositionSetting = -1,
    kind: KindSetting = "log_probability",
    batch_size: Annotated[int, "texts of equal length that run together", Bounds(1)] = 16,
) -> xr.DataArray:
    """`a[j] = Σ_d e_jd · ∂s/∂e_jd` at the word embeddings e, as [batch, key]; `signed=False` takes `|a[j]|`.

    `s` is `kind` of `answer` (or of the token that the model predicts), less that of `wrong` where one is given, at
    `position`; or `measure(logits) → [batch]` of your own. Abnar & Zuidema take the absolute value.
    Unit: that of s. Source: the code of Abnar & Zuidema, checked; the attribution to Shrikumar et al. from memory.

    Question: How much of the prediction is each input token's, to first order?
    Unit: change of what is explained (nats for a log-probability).
    Source: Shrikumar et al. 2016, arXiv:1605.01713; Abnar & Zuidema 2020, arXiv:2005.00928.
    Cost: one forward and backward pass.
    Not for: shares that must add up: they do for a linear model alone (use integrated_gradients).
    """
    asked = Explained(model, measure, answer, wrong, position, kind)
    texts = Texts.of(model, examples, batch_size)
    found = texts.empty()
    for batch in texts.batches:
        value = asked.of(batch)
        embedded = embedded_tokens(model, batch.ids)
        slope, _ = input_slopes(model, embedded, value, torch.arange(len(batch.places)))
        share = (slope.double() * embedded.double()).sum(-1)
        texts.spread(batch, share if signed else share.abs(), found)
    attrs = {"signed": signed, **asked.settings}
    return texts.by_key(found, "input_x_gradient", attrs)
