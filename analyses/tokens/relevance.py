"""Relevance of input tokens to one output: attention weighted by its gradient, added up through the layers.

Chefer, Gur & Wolf 2021 (arXiv 2103.15679), which needs no layer-wise relevance rules: for self-attention here, for
encoder–decoder models in `_encoder_decoder.py`. The rows asked for are pulled down through the layers and each layer's
slopes are multiplied out in blocks of rows, so memory is linear in the length. MLPs and norms take part through the
gradient alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Annotated

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
from headwater.analyses.tokens._encoder_decoder import Pairs, relevance_of_pairs
from headwater.analyses.tokens._gradients import WeightSlopes, weight_slopes
from headwater.lens.errors import AnalysisError
from headwater.lens.model import HookedModel


@analysis
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
    decoder: Annotated[
        str | Sequence[str] | Tensor | None,
        "encoder–decoder models: what the decoder reads; none: its start token",
    ] = None,
) -> xr.DataArray:
    """Rows `R[i, :]` after `R ← R + Ā_l R` for each layer upward from `R = I`, as [batch, query, key].

    `Ā_l = mean_h relu(∂s/∂A_l ⊙ A_l)`, so `R = (I + Ā_L) ··· (I + Ā_1)`. `s` is what is explained at `position`: the
    logit of `answer`, or of the token the model predicts, less that of `wrong` where one is given; or
    `measure(logits) → [batch]` of your own. Read out the row of the position that predicts (in the paper: CLS). The
    identity is left in: the token of the row itself has 1 more than it receives. Weights are those of the run, under
    whatever edits are on.

    Encoder–decoder models (T5, BART, Whisper): `examples` are what the encoder reads, or `model.to_tokens(…)` of both
    sides; `position` and `queries` count the decoder's tokens. With s for the decoder and q for the encoder, `R_qq` is
    the R above and each layer of the decoder does, from `R_ss = I` and `R_sq = 0` upward,
    `R_ss ← R_ss + Ā R_ss`, `R_sq ← R_sq + Ā R_sq` for its own attention, then for cross-attention
    `R_sq ← R_sq + R̄_ssᵀ Ā R̄_qq`, `R̄ = rownorm(R - I) + I` (a row of zeros stays zero, so that R̄ is I there).
    The keys are the encoder's tokens and behind them the decoder's, told apart by the coordinate `key_part`: `R_sq`
    and `R_ss`. These have different scales; compare tokens of one side. The encoder never attends to the decoder, so
    the paper's fourth rule (`R_ss ← R_ss + Ā R_qs`) adds nothing.

    Cost: that of About; on an encoder and a decoder every layer is multiplied out twice, memory
    O(S·queries·decoder layers). Not for: evidence against an answer; models whose two streams attend to each other
    (LXMERT) or whose towers never do (CLIP), which are refused, as are images read beside a text.
    Unit: relevance, no scale; compare tokens within a row. Source: the authors' code, checked.

    Question: Which input tokens does attention carry into this prediction?
    Unit: relevance, from 1 of the token itself upward; only the order within a row has a meaning.
    Source: Chefer, Gur & Wolf 2021, arXiv:2103.15679.
    Cost: one forward and backward pass, then all rows of each layer once (encoder–decoder: twice); memory
    O(S·queries), time O(layers·S²·d).
    Not for: evidence against an answer (negative parts are cut off); what reaches the answer through MLPs alone.
    """
    asked = Explained(model, measure, answer, wrong, position, kind)
    if model.is_encoder_decoder:
        pairs = Pairs.of(model, examples, decoder, batch_size)
        return relevance_of_pairs(asked, pairs, queries, asked.settings)
    if decoder is not None:
        raise AnalysisError(f"{model.name} has no decoder beside an encoder; leave decoder= out")

    def layers(batch: Batch) -> Iterator[Pull]:
        slopes = weight_slopes(model, batch, asked.of(batch))
        for layer in reversed(model.layers):
            yield partial(_pulled, slopes.pop(layer))

    attrs = asked.settings
    return Texts.of(model, examples, batch_size).rows_down(queries, layers, "relevance", attrs)


def _pulled(slopes: WeightSlopes, rows: Tensor) -> Tensor:
    """`rows @ (Ā + I)` of one layer."""
    rows = rows.to(slopes.slope.device)
    return rows + slopes.pulled(rows)
