"""Input gradient: how steeply a prediction changes with the vector of each input token.

Simonyan, Vedaldi & Zisserman 2013 (arXiv 1312.6034) for images; the sum over the embedding as in Abnar & Zuidema 2020
(arXiv 2005.00928). One forward and one backward pass.
"""

from __future__ import annotations

from typing import Annotated, Literal

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
from headwater.lens.errors import AnalysisError
from headwater.lens.model import HookedModel

ROUNDING = 1e-4  # a sum that is smaller, relative to the sum of its terms' sizes, is rounding


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
    batch_size: BatchSize = 16,
) -> xr.DataArray:
    """`g[j] = ‖∂s/∂e_j‖₂` at the vectors e of the input tokens, as [batch, key]; `reduce="sum"`: `|Σ_d ∂s/∂e_jd|`.

    Vectors are word embeddings, or patch embeddings of a tower of pictures, where class and register tokens have NaN.
    Sound, and a text in which pictures or sound take places, have the stream in front of the first block. An
    encoder–decoder has the encoder's tokens, then the decoder's; the coordinate `key_part` tells them apart.

    Abnar & Zuidema take the sum. A model that reads its stream through LayerNorms alone (GPT-2, BERT) ignores a shift
    of all components, so the sum is 0 for every text; it is refused there. `s` is `kind` of `answer` (none: the token
    that the model predicts for the text), less that of `wrong` if one is given, at `position`; or a
    `measure(logits) → [batch]` of the caller. Position embeddings are not changed.

    Question: To which input token does the prediction react most, for small changes?
    Unit: change of what is explained per unit of embedding.
    Source: Simonyan, Vedaldi & Zisserman 2013, arXiv:1312.6034 (the norm, from memory); Abnar & Zuidema 2020,
    arXiv:2005.00928 (held to the authors' code).
    Cost: one forward and backward pass.
    Not for: what happens when a token is taken away: the slope may be flat where the answer is sure.

    >>> import headwater as hw
    >>> model = hw.load("tasks-4l")
    >>> prompt = "When Mary and John went to the store , John gave a drink to"
    >>> found = hw.analyses.input_gradient(model, prompt, answer="Mary", wrong="John")
    >>> found.dims, found.key_token.values[0, found[0].values.argmax()].item()
    (('batch', 'key'), 'When')
    """
    asked = Explained(model, measure, answer, wrong, position, kind, of_classes=True)
    inputs = Inputs.of(model, examples, batch_size)
    found = inputs.empty()
    for batch in inputs.batches:
        entering = inputs.enter(batch)
        slopes = entering.slopes(asked.of(batch))
        totals = [slope.sum(-1).abs() for slope in slopes]
        for slope, total in zip(slopes, totals, strict=True):
            if reduce == "sum" and (total <= ROUNDING * slope.abs().sum(-1)).all() and slope.any():
                raise AnalysisError(
                    f"{model.name} does not notice a shift of all components of an embedding, so slopes sum to 0; "
                    'use reduce="norm"'
                )
        values = totals if reduce == "sum" else [slope.norm(dim=-1) for slope in slopes]
        inputs.spread(batch, values, found)
    return inputs.by_key(found, "input_gradient")
