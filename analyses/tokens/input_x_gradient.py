"""Input × gradient: the first-order share of each input token in a prediction.

Shrikumar et al. 2016 (arXiv 1605.01713), at word embeddings. One forward and one backward pass.
"""

from __future__ import annotations

from typing import Annotated

import xarray as xr

from headwater.analyses._catalogue.analysis import analysis
from headwater.analyses._catalogue.settings import BatchSize
from headwater.analyses._inputs.inputs import Inputs
from headwater.analyses._measures.measure import (
    AnswerSetting,
    Explained,
    KindSetting,
    Measure,
    PositionSetting,
    WrongSetting,
)
from headwater.analyses._prompts.examples import Examples
from headwater.lens.attention import backward_rules
from headwater.lens.attention.backward_rules import BackwardRule
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
    batch_size: BatchSize = 16,
    rule: Annotated[BackwardRule, "what the backward pass follows"] = "gradient",
) -> xr.DataArray:
    """`a[j] = Σ_d e_jd · ∂s/∂e_jd` at the vectors e of the input tokens, as [batch, key]; `signed=False`: `|a[j]|`.

    Vectors are those of `input_gradient`: words, patches, sound, and both sides of an encoder–decoder.

    `s` is `kind` of `answer` (none: the token that the model predicts for the text), less that of `wrong` if one is
    given, at `position`; or a `measure(logits) → [batch]` of the caller. Abnar & Zuidema take the absolute value.

    `rule` puts something else in the place of the gradient, as `patch` says of its estimates. Under "relp" the shares
    of one logit of a model without biases sum to the logit: relevance is conserved. What biases and position embeddings
    hold is not among the shares.

    Question: How much of the prediction is each input token's, to first order?
    Unit: change of what is explained (nats for a log-probability).
    Source: Shrikumar et al. 2016, arXiv:1605.01713 (from memory); Abnar & Zuidema 2020, arXiv:2005.00928 (held to the
    authors' code); rules: RelP, arXiv:2508.21258, GIM, arXiv:2505.17630, AttnLRP, arXiv:2402.05602 (patented in part).
    Cost: one forward and backward pass.
    Not for: shares that must add up: they do for a linear model alone (use integrated_gradients, or relp
    without biases).

    >>> import headwater as hw
    >>> model = hw.load("tasks-4l")
    >>> prompt = "When Mary and John went to the store , John gave a drink to"
    >>> found = hw.analyses.input_x_gradient(model, prompt, answer="Mary", wrong="John", signed=False)
    >>> found.dims, bool((found >= 0).all())
    (('batch', 'key'), True)
    """
    asked = Explained(model, measure, answer, wrong, position, kind, of_classes=True)
    inputs = Inputs.of(model, examples, batch_size)
    found = inputs.empty()
    for batch in inputs.batches:
        entering = inputs.enter(batch)
        with backward_rules.following(rule):
            slopes = entering.slopes(asked.of(batch))
        shares = [
            (slope * each.double()).sum(-1) for slope, each in zip(slopes, entering.vectors, strict=True)
        ]
        values = shares if signed else [share.abs() for share in shares]
        inputs.spread(batch, values, found)
    return inputs.by_key(found, "input_x_gradient")
