"""Integrated gradients: shares of the input tokens that add up to the change of a prediction from a baseline.

Sundararajan, Taly & Yan 2017 (arXiv 1703.01365), along the straight line from the word embeddings of a baseline to
those of the text. The integral is a Gauss–Legendre sum. The sum of the shares is checked, and points are added until it
fits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from headwater.analyses._catalogue.analysis import analysis
from headwater.analyses._catalogue.settings import Bounds
from headwater.analyses._inputs.blanks import Blanks
from headwater.analyses._inputs.inputs import Entering, Inputs, Value
from headwater.analyses._measures.blanks import BlankSetting
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

MOST = 1024  # points; a prediction that needs more is too jagged for a straight path
ROUNDING = 8  # units of rounding by which the explained number may be off
Baseline = Literal["mean", "blank", "zero"]


@analysis
def integrated_gradients(
    model: HookedModel,
    examples: Examples,
    steps: Annotated[int, "points of the integral at the start", Bounds(1, MOST)] = 16,
    tolerance: Annotated[float, "largest gap, as a part of the shares' absolute sum", Bounds(0.0)] = 0.02,
    baseline: Annotated[Baseline, "the mean vector, blank tokens, or zeros"] = "mean",
    measure: Measure | None = None,
    answer: AnswerSetting = None,
    wrong: WrongSetting = None,
    position: PositionSetting = -1,
    kind: KindSetting = "log_probability",
    blank: BlankSetting = None,
    batch_size: Annotated[int, "points of the path that run together", Bounds(1)] = 16,
) -> xr.DataArray:
    """`a[j] = Σ_d (e_jd - b_jd)·∫₀¹ ∂s/∂e_jd(b + t(e - b)) dt`, as [batch, key].

    `e` are the vectors of the input tokens as in `input_gradient` (words, patches, sound, both sides of an
    encoder–decoder), `b` those of the baseline; position embeddings are not changed. The mean is that of all words, and
    of patches, sound or a text with pictures that of the example's own vectors; blanks are those of `blank_out`. The
    shares are complete: `Σ_j a[j] = s(e) - s(b)`. The coordinates `gap` and `steps` hold what is missing per text and
    the number of points. Where the gap exceeds `tolerance · Σ_j |a[j]|` the number of points doubles, up to 1,024;
    beyond, an error says how large the gap still is. `s` is `kind` of `answer` (none: the token that the model predicts
    for the text), less that of `wrong` if one is given, at `position`; or a `measure(logits) → [batch]` of the caller,
    which gets points on the path of one text. Two kinds of model do not add up well. Under an RMSNorm (Llama), zero
    embeddings put the change into the first thousandths of the path, so the default baseline is the mean. A mixture of
    experts jumps where it switches experts.

    Question: How do the input tokens share the change of the prediction from a baseline text?
    Unit: change of what is explained (nats for a log-probability); a row sums to the whole change.
    Source: Sundararajan, Taly & Yan 2017, arXiv:1703.01365; formula from memory, completeness checked on every result.
    Cost: `steps` forward and backward passes per text, doubled until the shares add up.
    Not for: claims without the baseline: another one is another question; points of the path are unlike any text.

    >>> import headwater as hw
    >>> model = hw.load("tasks-4l")
    >>> prompt = "When Mary and John went to the store , John gave a drink to"
    >>> found = hw.analyses.integrated_gradients(model, prompt, answer="Mary", wrong="John", kind="logit")
    >>> found.key_token.values[0, found[0].values.argmax()].item(), bool(abs(found.gap[0]) < 0.02 * abs(found).sum())
    ('to', True)
    """
    asked = Explained(model, measure, answer, wrong, position, kind, of_classes=True)
    inputs = Inputs.of(model, examples, batch_size)
    found = inputs.empty()
    blanks = Blanks.of(inputs, blank) if baseline == "blank" else None
    gaps, taken = np.full(len(found[0]), np.nan), np.zeros(len(found[0]), dtype=int)
    for batch in inputs.batches:
        value = asked.of(batch)
        at = inputs.enter(batch)
        start = _start(at, baseline, blanks)
        shares = [torch.zeros(each.shape[:2], dtype=torch.float64) for each in at.vectors]
        for text, place in enumerate(batch.places):
            path = _Path(at, value, text, start, batch_size)
            mine, gaps[place], taken[place] = path.shares(steps, tolerance, place)
            for side, each in zip(shares, mine, strict=True):
                side[text] = each
        inputs.spread(batch, shares, found)
    result = inputs.by_key(found, "integrated_gradients")
    return result.assign_coords(gap=("batch", gaps), steps=("batch", taken))


def _start(at: Entering, baseline: Baseline, blanks: Blanks | None) -> list[Tensor]:
    """The vectors of the baseline, in the shapes of the batch's."""
    if blanks is not None:
        return blanks.vectors(at)
    if baseline == "zero":
        return [torch.zeros_like(each) for each in at.vectors]
    return [
        (each.double().mean(1, keepdim=True) if table is None else table.double().mean(0))
        .to(each)
        .expand_as(each)
        for table, each in zip([each.table for each in at.where], at.vectors, strict=True)
    ]


class _Path:
    """The straight line from the baseline to one text."""

    def __init__(self, at: Entering, value: Value, text: int, start: Sequence[Tensor], size: int) -> None:
        self.at, self.value, self.text, self.size = at, value, text, size
        self.start = [each[text] for each in start]
        self.way = [each[text] - first for each, first in zip(at.vectors, self.start, strict=True)]
        both = torch.tensor([text, text])
        found = value(at.outputs(both, self._forms(torch.tensor([0.0, 1.0]))), both)
        first, last = found.double().tolist()
        # equal rows of a batch may be rounded differently
        self.change = last - first if any(way.any() for way in self.way) else 0.0
        self.noise = max(1e-6, ROUNDING * torch.finfo(found.dtype).eps * max(abs(first), abs(last)))

    def _forms(self, t: Tensor) -> list[Tensor]:
        """Points of the path, [point, position, feature] of each side."""
        return [
            first + t.to(way)[:, None, None] * way for first, way in zip(self.start, self.way, strict=True)
        ]

    def shares(self, steps: int, tolerance: float, place: int) -> tuple[list[Tensor], float, int]:
        """Shares [position] of each side that add up, the remaining gap, and the number of points."""
        while True:
            found = self._sum(steps)
            gap = self.change - sum(float(each.sum()) for each in found)
            size = sum(float(each.abs().sum()) for each in found)
            if not math.isfinite(gap):
                raise AnalysisError(
                    f"the gradients of example {place} are not finite between it and the baseline; give another one"
                )
            # a gap within the rounding of the model's own numbers is accepted
            if abs(gap) <= max(tolerance * size, self.noise):
                return found, gap, steps
            if steps >= MOST:
                mend = f"tolerance={1.1 * abs(gap) / size:.2g} or " if size else ""
                raise AnalysisError(
                    f"the shares of example {place} miss {gap:.3g} of a change of {self.change:.3g} at {steps} points; "
                    f"give {mend}another baseline"
                )
            steps = min(2 * steps, MOST)

    def _sum(self, steps: int) -> list[Tensor]:
        points, weights = np.polynomial.legendre.leggauss(steps)
        totals = [torch.zeros_like(way, dtype=torch.float64) for way in self.way]
        for i in range(0, steps, self.size):
            forms = self._forms(torch.from_numpy((points[i : i + self.size] + 1) / 2))
            copies = torch.full((len(forms[0]),), self.text)
            weight = torch.from_numpy(weights[i : i + self.size] / 2)
            for total, slopes in zip(totals, self.at.slopes(self.value, copies, forms), strict=True):
                total += torch.einsum("n,npd->pd", weight.to(total), slopes)
        return [(total * way.double()).sum(-1).cpu() for total, way in zip(totals, self.way, strict=True)]
