"""Blank-out: how much a prediction changes when a blank replaces one input token. Also known as occlusion.

Abnar & Zuidema 2020 (arXiv 2005.00928) take it as the ground truth. It costs one forward pass per token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import torch
import xarray as xr
from torch import Tensor

from headwater.analyses._catalogue.analysis import analysis
from headwater.analyses._catalogue.settings import BatchSize
from headwater.analyses._measures.blanks import BlankSetting, answers, blank_id, blanked
from headwater.analyses._measures.measure import (
    AnswerSetting,
    Explained,
    KindSetting,
    Measure,
    PositionSetting,
    WrongSetting,
)
from headwater.analyses._prompts.examples import Batch, Examples
from headwater.analyses._prompts.texts import Texts
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

    Question: How much does the prediction change without one of the input tokens?
    Unit: change of what is explained (nats for a log-probability).
    Source: Abnar & Zuidema 2020, arXiv:2005.00928; held to the authors' code.
    Cost: one forward pass per token of each text; memory that of `batch_size` texts.
    Not for: tokens that stand in for each other: each looks needless; a text with a blank may be unlike any text.

    >>> import headwater as hw
    >>> model = hw.load("tasks-4l")
    >>> prompt = "When Mary and John went to the store , John gave a drink to"
    >>> found = hw.analyses.blank_out(model, prompt, answer="Mary", wrong="John", signed=True)
    >>> found.key_token.values[0, found[0].values.argmax()].item()  # without this token the answer loses most
    'Mary'
    """
    asked = Explained(model, measure, answer, wrong, position, kind, of_classes=True)
    texts = Texts.of(model, examples, batch_size)
    filler = blank_id(model, blank)
    found = texts.empty()
    total = sum(batch.ids.numel() for batch in texts.batches)
    with progress(total=total, desc="blank out", unit="token") as bar:
        for batch in texts.batches:
            change = _changes(model, batch, asked.of(batch), filler, batch_size, bar)
            texts.spread(batch, change if signed else change.abs(), found)
    return texts.by_key(found, "blank_out").assign_attrs(blank=filler)


def _changes(
    model: HookedModel,
    batch: Batch,
    value: Callable[[Tensor, Tensor], Tensor],
    filler: int,
    rows: int,
    bar: Bar,
) -> Tensor:
    """The change of the number without each token, [text, token]; a few variants of a text run at a time."""
    ids, place = batch.ids.cpu(), torch.arange(batch.ids.shape[1])
    whole = answers(model, batch, value, ids[:, None], rows)
    found = []
    for some in place.split(rows):
        forms = torch.stack([blanked(text, some[:, None] == place, filler) for text in ids])
        found.append(answers(model, batch, value, forms, rows))
        bar.update(len(ids) * len(some))
    return whole - torch.cat(found, 1)
