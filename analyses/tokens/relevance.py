"""Relevance of input tokens to one output: attention weighted by its gradient, added up through the layers.

Chefer, Gur & Wolf 2021 (arXiv 2103.15679), which needs no layer-wise relevance rules. Self-attention is here,
encoder–decoder models are in `_encoder_decoder.py`. The asked rows are pulled down through the layers, and each layer's
gradients are multiplied out in blocks of rows, so memory is linear in the length. MLPs and norms take part through the
gradient alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Annotated

import xarray as xr
from torch import Tensor

from headwater.analyses._catalogue.analysis import analysis
from headwater.analyses._catalogue.settings import BatchSize
from headwater.analyses._inputs.entrances import sides_of
from headwater.analyses._inputs.inputs import Inputs
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
from headwater.analyses._streams.between_layers import refuse_mixers
from headwater.analyses.tokens._encoder_decoder import relevance_of_pairs
from headwater.analyses.tokens._gradients import WeightSlopes, predicting, weight_slopes
from headwater.lens.errors import AnalysisError
from headwater.lens.model import HookedModel
from headwater.lens.naming.tokens import Tokens


@analysis
def relevance(
    model: HookedModel,
    examples: Examples,
    queries: Annotated[
        Positions | None, 'rows to read out, e.g. -1; "all" for every one; none: the one that predicts'
    ] = None,
    measure: Measure | None = None,
    answer: AnswerSetting = None,
    wrong: WrongSetting = None,
    position: PositionSetting = -1,
    kind: KindSetting = "logit",
    batch_size: BatchSize = 16,
    decoder: Annotated[
        str | Sequence[str] | Tensor | None,
        "encoder–decoder models: what the decoder reads; none: its start token",
    ] = None,
) -> xr.DataArray:
    """Rows `R[i, :]` after `R ← R + Ā_l R` for each layer upward from `R = I`, as [batch, query, key].

    `Ā_l = mean_h relu(∂s/∂A_l ⊙ A_l)`, so `R = (I + Ā_L) ··· (I + Ā_1)`. `s` is `kind` of `answer` (none: the token
    that the model predicts for the text), less that of `wrong` if one is given, at `position`; or a
    `measure(logits) → [batch]` of the caller. Without `queries` the row is read that predicts: `position`, or in a
    classifier and a tower the position that the outputs read it at (in the paper: CLS); where they read several, name
    the rows. The identity is left in: the token of the row itself has 1 more than it receives. Weights are those of the
    run under the active edits. Two towers (CLIP) are read one by one, `model.part("vision")` by what the similarity of
    a text and its own picture draws from it.

    Encoder–decoder models (T5, BART, Whisper): `examples` are the encoder's texts, or `model.to_tokens(…)` of both
    sides; `position` and `queries` count the decoder's tokens. With s for the decoder and q for the encoder, `R_qq` is
    the R above. From `R_ss = I` and `R_sq = 0` upward, each layer of the decoder applies `R_ss ← R_ss + Ā R_ss`,
    `R_sq ← R_sq + Ā R_sq` for its self-attention, then for cross-attention `R_sq ← R_sq + R̄_ssᵀ Ā R̄_qq`,
    `R̄ = rownorm(R - I) + I` (a row of zeros stays zero, so that R̄ is I there). The keys are the encoder's tokens,
    then the decoder's; the coordinate `key_part` tells them apart: `R_sq` and `R_ss`. The two have different scales, so
    compare tokens of one side. The encoder never attends to the decoder, so the paper's fourth rule
    (`R_ss ← R_ss + Ā R_qs`) adds nothing.

    Question: Which input tokens does attention carry into this prediction?
    Unit: relevance, from 1 of the token itself upward; only the order within a row has a meaning.
    Source: Chefer, Gur & Wolf 2021, arXiv:2103.15679; held to the authors' code.
    Cost: one forward and backward pass, then all rows of each layer once; memory O(S·queries), time O(layers·S²·d).
    Encoder–decoder: every layer twice, memory O(S·queries·decoder layers).
    Not for: evidence against an answer (negative parts are cut off); what reaches the answer through MLPs alone.

    >>> import headwater as hw
    >>> model = hw.load("tasks-4l")
    >>> prompt = "When Mary and John went to the store , John gave a drink to"
    >>> found = hw.analyses.relevance(model, prompt, answer="Mary", wrong="John")
    >>> found.key_token.values[0, found[0, 0, :-1].values.argmax()].item()  # beside the position itself
    'and'
    """
    for side in sides_of(model):
        refuse_mixers(model.name, side.mixers, "relevance")
    asked = Explained(model, measure, answer, wrong, position, kind, of_classes=True)
    if decoder is not None:
        examples = _both(model, examples, decoder)
    if model.part_name == "cross" or model.other_attention:
        inputs = Inputs.of(model, examples, batch_size)
        if len(inputs.sides) < 2:
            raise AnalysisError(
                f"the cross-attention of {model.name} reads states that none of its parts ({', '.join(model.parts)}) "
                "gives, so relevance can not be followed into them; read another part"
            )
        return relevance_of_pairs(asked, inputs, queries)

    def layers(batch: Batch) -> Iterator[Pull]:
        slopes = weight_slopes(model, batch, asked.of(batch))
        for layer in reversed(model.layers):
            yield partial(_pulled, slopes.pop(layer))

    texts = Texts.of(model, examples, batch_size)
    rows: Positions = [predicting(asked, texts.batches)] if queries is None else queries
    return texts.rows_down(rows, layers, "relevance").assign_attrs(queries=rows)


def _both(model: HookedModel, examples: Examples, decoder: str | Sequence[str] | Tensor) -> Tokens:
    """Examples for the encoder and texts for the decoder; one decoder text given as a string goes with each example."""
    if not model.is_encoder_decoder:
        raise AnalysisError(f"{model.name} has no decoder beside an encoder; leave decoder= out")
    if isinstance(examples, Tokens) and examples.more:
        raise AnalysisError("these examples hold the decoder's tokens already; leave decoder= out")
    if isinstance(decoder, str) and not isinstance(examples, str):
        decoder = [decoder] * len(examples)
    return model.to_tokens(examples, decoder_input_ids=decoder)


def _pulled(slopes: WeightSlopes, rows: Tensor) -> Tensor:
    """`rows @ (Ā + I)` of one layer."""
    rows = rows.to(slopes.slope.device)
    return rows + slopes.pulled(rows)
