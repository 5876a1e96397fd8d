"""Blank-out: how much a prediction changes when a blank replaces one input token. Also known as occlusion.

Abnar & Zuidema 2020 (arXiv 2005.00928) take it as the ground truth. It costs one forward pass per token.
"""

from __future__ import annotations

from typing import Annotated

import torch
import xarray as xr
from torch import Tensor

from headwater.analyses._catalogue.analysis import analysis
from headwater.analyses._catalogue.settings import BatchSize
from headwater.analyses._inputs.blanks import Blanks
from headwater.analyses._inputs.inputs import Inputs, Value
from headwater.analyses._measures.blanks import BlankSetting
from headwater.analyses._measures.measure import (
    AnswerSetting,
    Explained,
    KindSetting,
    Measure,
    PositionSetting,
    WrongSetting,
)
from headwater.analyses._prompts.examples import Batch, Examples
from headwater.lens.model import HookedModel
from headwater.lens.progress import Bar, progress


@analysis
def blank_out(
    model: HookedModel,
    examples: Examples,
    measure: Measure | None = None,
    answer: AnswerSetting = None,
    wrong: WrongSetting = None,
    position: PositionSetting = -1,
    kind: KindSetting = "log_probability",
    blank: BlankSetting = None,
    signed: Annotated[bool, "keep the sign: above 0 the token speaks for the answer"] = False,
    batch_size: BatchSize = 16,
) -> xr.DataArray:
    """`e[j] = |s(x) - s(x with token j blank)|`, as [batch, key]; `signed` keeps the sign.

    `s` is `kind` of `answer` (none: the token that the model predicts for the text), less that of `wrong` if one is
    given, at `position`; or a `measure(logits) → [batch]` of the caller, which gets rows of any text. The paper takes
    `kind="probability"` of the right and the wrong verb. The token at `position` is blanked like the others.

    A patch of a picture, or a position of sound, becomes what the same picture or sound gives there when it is nothing
    but its own mean (of each channel over all pixels, of each feature over time); class and register tokens have NaN.
    Where a picture takes places in a text, its vectors there are so replaced. An encoder–decoder has the encoder's
    tokens, then the decoder's; the coordinate `key_part` tells them apart.

    Question: How much does the prediction change without one of the input tokens?
    Unit: change of what is explained (nats for a log-probability).
    Source: Abnar & Zuidema 2020, arXiv:2005.00928; held to the authors' code.
    Cost: one forward pass per token of each text; memory that of `batch_size` texts.
    Not for: tokens that stand in for each other: each looks needless; a text with a blank may be unlike any text;
        sounds behind a norm over time (HuBERT, wav2vec 2.0), where a sound that stays the same is rounding.

    >>> import headwater as hw
    >>> model = hw.load("tasks-4l")
    >>> prompt = "When Mary and John went to the store , John gave a drink to"
    >>> found = hw.analyses.blank_out(model, prompt, answer="Mary", wrong="John", signed=True)
    >>> found.key_token.values[0, found[0].values.argmax()].item()  # without this token the answer loses most
    'Mary'
    """
    asked = Explained(model, measure, answer, wrong, position, kind, of_classes=True)
    inputs = Inputs.of(model, examples, batch_size)
    blanks = Blanks.of(inputs, blank)
    found = inputs.empty()
    total = int(inputs.valid.sum())
    with progress(total=total, desc="blank out", unit="token") as bar:
        for batch in inputs.batches:
            change = _changes(blanks, batch, asked.of(batch), batch_size, bar)
            inputs.spread(batch, change if signed else [each.abs() for each in change], found)
    return inputs.by_key(found, "blank_out").assign_attrs(blank=blanks.told)


def _changes(blanks: Blanks, batch: Batch, value: Value, rows: int, bar: Bar) -> list[Tensor]:
    """The change of the number without each token, [text, token] of each side; a few variants of a text run at a
    time."""
    places = [each.places for each in blanks.inputs.entrances(batch)]
    every = torch.cat(places)
    texts, found = len(batch.places), []
    whole = blanks.scores(batch, value, torch.zeros(texts, 1, len(every), dtype=torch.bool), rows)
    for some in every.nonzero()[:, 0].split(rows):
        gone = torch.nn.functional.one_hot(some, len(every)).bool().expand(texts, -1, -1)
        found.append(whole - blanks.scores(batch, value, gone, rows))
        bar.update(texts * len(some))
    return list(torch.cat(found, 1).split([int(each.sum()) for each in places], 1))
