"""Integrated gradients: shares of the input tokens that add up to the change of a prediction from a baseline.

Sundararajan, Taly & Yan 2017 (arXiv 1703.01365), along the straight line from the word embeddings of a baseline to
those of the text. The integral is a Gauss–Legendre sum. The sum of the shares is checked, and points are added until it
fits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Literal

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from headwater.analyses._catalogue.analysis import analysis
from headwater.analyses._catalogue.settings import Bounds
from headwater.analyses._measures.blanks import BlankSetting, blank_id
from headwater.analyses._measures.measure import (
    AnswerSetting,
    Explained,
    KindSetting,
    Measure,
    PositionSetting,
    WrongSetting,
    embedded_tokens,
    run_embedded,
)
from headwater.analyses._prompts.examples import Batch, Examples
from headwater.analyses._prompts.texts import Texts
from headwater.analyses.tokens._gradients import input_slopes
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
    baseline: Annotated[Baseline, "the mean of all embeddings, a blank token, or zeros"] = "mean",
    measure: Measure | None = None,
    answer: AnswerSetting = None,
    wrong: WrongSetting = None,
    position: PositionSetting = -1,
    kind: KindSetting = "log_probability",
    blank: BlankSetting = None,
    batch_size: Annotated[int, "points of the path that run together", Bounds(1)] = 16,
) -> xr.DataArray:
    """`a[j] = Σ_d (e_jd - b_jd)·∫₀¹ ∂s/∂e_jd(b + t(e - b)) dt`, as [batch, key].

    `e` are the text's word embeddings, `b` those of the baseline; position embeddings are not changed. The shares are
    complete: `Σ_j a[j] = s(e) - s(b)`. The coordinates `gap` and `steps` hold what is missing per text and the number
    of points. Where the gap exceeds `tolerance · Σ_j |a[j]|` the number of points doubles, up to 1,024; beyond, an
    error says how large the gap still is. `s` is `kind` of `answer` (none: the token that the model predicts for the
    text), less that of `wrong` if one is given, at `position`; or a `measure(logits) → [batch]` of the caller, which
    gets points on the path of one text. Two kinds of model do not add up well. Under an RMSNorm (Llama), zero
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
    texts = Texts.of(model, examples, batch_size)
    found = texts.empty()
    gaps, taken = np.full(len(found), np.nan), np.zeros(len(found), dtype=int)
    for batch in texts.batches:
        value = asked.of(batch)
        embedded = embedded_tokens(model, batch.ids)
        start = _start(model, batch, embedded, baseline, blank)
        shares = torch.zeros(batch.ids.shape, dtype=torch.float64)
        for text, place in enumerate(batch.places):
            path = _Path(model, value, batch, text, start[text], embedded[text], batch_size)
            shares[text], gaps[place], taken[place] = path.shares(steps, tolerance, place)
        texts.spread(batch, shares, found)
    result = texts.by_key(found, "integrated_gradients")
    return result.assign_coords(gap=("batch", gaps), steps=("batch", taken))


def _start(
    model: HookedModel, batch: Batch, embedded: Tensor, baseline: Baseline, blank: str | None
) -> Tensor:
    """Embeddings of the baseline, in the shape of the batch's."""
    if baseline == "zero":
        return torch.zeros_like(embedded)
    if baseline == "blank":
        return embedded_tokens(model, torch.full_like(batch.ids, blank_id(model, blank)))
    every = embedded_tokens(model, torch.arange(model.vocab)[None])[0]
    return every.double().mean(0).to(embedded).expand_as(embedded)


class _Path:
    """The straight line from the baseline to one text."""

    def __init__(
        self, model: HookedModel, value: Callable[[Tensor, Tensor], Tensor], batch: Batch, text: int, start: Tensor,
        end: Tensor, size: int,
    ) -> None:  # fmt: skip
        self.model, self.value, self.batch, self.text = model, value, batch, text
        self.start, self.size = start, size
        self.way = end - start
        ends = torch.stack([start, end])
        both = torch.tensor([text, text])
        found = value(run_embedded(model, ends, batch.rows(both)), both)
        first, last = found.double().tolist()
        # equal rows of a batch may be rounded differently
        self.change = last - first if self.way.any() else 0.0
        self.noise = max(1e-6, ROUNDING * torch.finfo(found.dtype).eps * max(abs(first), abs(last)))

    def shares(self, steps: int, tolerance: float, place: int) -> tuple[Tensor, float, int]:
        """Shares [position] that add up, the remaining gap, and the number of points."""
        while True:
            found = self._sum(steps)
            gap = self.change - float(found.sum())
            size = float(found.abs().sum())
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

    def _sum(self, steps: int) -> Tensor:
        points, weights = np.polynomial.legendre.leggauss(steps)
        total = torch.zeros_like(self.way, dtype=torch.float64)
        for i in range(0, steps, self.size):
            t = torch.from_numpy((points[i : i + self.size] + 1) / 2).to(self.way)
            forms = self.start + t[:, None, None] * self.way
            copies = torch.full((len(t),), self.text)
            slopes = input_slopes(self.model, forms, self.value, self.batch, copies)
            weight = torch.from_numpy(weights[i : i + self.size] / 2).to(total)
            total += torch.einsum("n,npd->pd", weight, slopes)
        return (total * self.way.double()).sum(-1).cpu()
