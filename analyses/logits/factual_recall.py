"""Factual recall: which heads write an answer, and what does an MLP make of their outputs?

After Lv et al. 2024 (arXiv 2403.19521): at the position that asks for a fact, heads move the topic there. An MLP acts
on their outputs like an activation (it lengthens some and erases others) and adds a vector of the task. The fit is
linear and descriptive; it does not say what would happen without a part.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from headwater.analyses._catalogue.analysis import analysis
from headwater.analyses._catalogue.settings import BatchSize, Bounds
from headwater.analyses._measures.bootstrap import intervals
from headwater.analyses._measures.measure import AnswerSetting, Explained, PositionSetting, WrongSetting
from headwater.analyses._prompts.examples import Examples
from headwater.analyses._prompts.positions import place_of
from headwater.analyses._prompts.texts import Texts
from headwater.analyses._streams.readout import Readout, soft_cap
from headwater.analyses._streams.writers import Writers
from headwater.analyses.logits._answer_position import (
    MEAN,
    WRONG,
    along,
    answers_of,
    halves,
    once,
    readouts,
    reads_own_heads,
    refuse_without_logits,
    tokens_of,
)
from headwater.analyses.logits._least_squares import ScalarFit
from headwater.lens.errors import AnalysisError
from headwater.lens.model import HookedModel
from headwater.lens.naming.heads import Head, HeadNames, every_head, named
from headwater.lens.progress import progress

Apart = Literal["text", "answer"]
UPSTREAM, LAYER = "upstream", "layer"
RESIDUAL, INTERCEPT, ERROR = "residual", "intercept", "error"
HALVES = ("fitted", "held out")
CONTROLS = 10  # fits with the terms of other texts
ERASED = 0.25  # largest distance from -1 of the interval of an erased head's weight; our choice


@analysis
def factual_recall(
    model: HookedModel,
    examples: Examples,
    answer: AnswerSetting = None,
    wrong: WrongSetting = None,
    layer: Annotated[int | None, "layer whose MLP is fitted; none: the heads' shares alone"] = None,
    heads: Annotated[
        HeadNames,
        "heads with a weight: upstream (all the MLP reads), layer (its own), or 1.5, 2.3 …",
    ] = UPSTREAM,
    apart: Annotated[
        Apart, "what the half that judges the fit shares no part of: texts, or answers"
    ] = "text",
    position: PositionSetting = -1,
    draws: Annotated[int, "redrawings of the texts for the intervals", Bounds(100)] = 1000,
    seed: Annotated[int, "seed of the halves and of the redrawings", Bounds(0)] = 0,
    batch_size: BatchSize = 16,
) -> xr.Dataset:
    """Shares of heads in the answer, and the fit `m_p ≈ Σ_h w_h·o_hp + w_r·r_p + b` of m, the output of the MLP of
    `layer`.

    Both are at `position`, over the different texts p of one task (`batch` says which are left). `head_share` [batch,
    layer, head, measure] is direct logit attribution with a frozen norm, in the answer's logit less the mean over the
    vocabulary ("ic") and less the wrong token's ("ic-iw", with `wrong`). `head_mean`, `head_low`, `head_high` are over
    texts (95 % bootstrap); `total` [batch, measure] is the whole logit.

    With `layer`: o_hp is the output of head h in the stream [d_model], r_p the rest that the MLP reads (embedding,
    other heads, biases, earlier MLPs), each w a number, b [d_model] the `intercept`. So `1 + w_h` of o_h is left behind
    the MLP. The fit is ordinary least squares, stacked over coordinates and the texts of the half "fitted" (`side`).
    `r_squared` [half] (against the mean of the fitted half) and `cosine` [batch] (of the mean itself: `cosine_of_mean`)
    are given for the half "held out" too. `shuffled_r_squared` [control] is the held-out R² of fits with the terms of
    other texts. `weight`, `weight_low`, `weight_high`, `inflation` and `verdict` are [term]. A verdict is "amplified"
    (interval above 0), "erased" (within 0.25 of -1), "damped" (below 0) or "open". A term that is the same in all texts
    has no weight (NaN) and is part of b. `part_share` [batch, part, measure] are the shares of each w·o, of w·r, b and
    the error, with `part_mean`, `part_low`, `part_high`; they add up to `mlp_share`.

    A norm behind attention or MLP (Gemma 2) is part of o and m. Refused are: as many weights as texts; terms that are
    nearly combinations of each other; heads that the MLP does not read (of later layers; in parallel blocks its own
    layer's); norms behind the sum (BERT).

    Question: Which heads write an answer, and what does an MLP make of what they wrote?
    Unit: logit (before a soft cap); weights are numbers without a unit.
    Source: Lv et al. 2024, arXiv:2403.19521; decomposition from its abstract and memory; r less the heads, halves,
    intervals and verdicts are ours.
    Cost: one forward pass; the fit one decomposition of [terms, texts · d_model] and `draws` small ones.
    Not for: causes, since an MLP and a head may both follow a third part (scale the heads to see causes); that b is of
    the task, which texts of one task can not show; weights with a low held-out R² or an `inflation` far above 1.

    >>> import headwater as hw
    >>> model = hw.load("tasks-4l")
    >>> prompt = "When Mary and John went to the store , John gave a drink to"
    >>> texts = [prompt, prompt.replace("drink", "ball"), prompt.replace("drink", "book")]
    >>> found = hw.analyses.factual_recall(model, texts, answer="Mary", draws=100)  # give layer= for the fit
    >>> found.head_share.dims, found.total.round(0).values[:, 0].tolist()
    (('batch', 'layer', 'head', 'measure'), [16.0, 16.0, 16.0])
    """
    named = [] if layer is None else _named(model, layer, heads)
    refuse_without_logits(model)
    asked_of = tokens_of(model, answer, "answer"), tokens_of(model, wrong, "wrong")
    explained = Explained(model, None, *asked_of, position, "logit")
    texts = Texts.of(model, examples, batch_size)
    found: dict[int, _Text] = {}
    for batch in progress(once(texts.batches), desc="factual recall", unit="batch"):
        place_of(position, batch.ids.shape[1], f"example {batch.places[0]}")
        run = Writers.of(model, batch)
        asked, other = answers_of(explained, run, batch)
        assert asked is not None
        values = _read(run, list(readouts(run, position, asked, other)), layer, named, position)
        for place, token, *row in zip(batch.places, asked.tolist(), *(v.cpu() for v in values), strict=True):
            found[place] = _Text(token, *row)
    places = sorted(found)
    rows = [found[place] for place in places]
    measures = [MEAN] if wrong is None else [MEAN, WRONG]
    answers = [text.answer for text in rows]
    result = xr.Dataset(
        {"total": (("batch", "measure"), torch.stack([text.total for text in rows]).numpy())},
        coords={
            "batch": places, "measure": measures, "layer": model.layers, "head": np.arange(model.n_heads),
            "answer": ("batch", model.to_strings(answers)),
        },
    )  # fmt: skip
    shares = torch.stack([text.heads for text in rows]).numpy()
    result = result.assign(_with_interval("head", ("layer", "head", "measure"), shares, draws, seed))
    condition = None
    if layer is not None:
        fitted = _fitted(rows, named, halves(places if apart == "text" else answers, seed), draws, seed)
        result, condition = result.merge(fitted), fitted.attrs["condition"]
    return result.assign_attrs(heads=named, texts=len(rows), condition=condition, soft_cap=soft_cap(model))


@dataclass(frozen=True, eq=False)
class _Text:
    """One text at `position`, in float64: the heads' shares `heads` [layer, head, measure] and `total` [measure];
    `reading` [measure, d_model] gives the share of any vector; the fit's `terms` [term, d_model] and `mlp` [d_model].
    """

    answer: int
    heads: Tensor
    total: Tensor
    reading: Tensor
    terms: Tensor
    mlp: Tensor


def _read(
    run: Writers, reads: list[Readout], layer: int | None, named: list[Head], position: int
) -> tuple[Tensor, ...]:
    """Heads' shares, totals, readings, terms and the MLP's outputs of the texts of a batch."""
    written = torch.stack([one.result[:, position] for one in run.layers.values()], 1)
    shares = torch.stack([readout.shares(written) for readout in reads], -1)
    totals = torch.stack([readout.total for readout in reads], -1)
    readings = torch.stack([along(readout) for readout in reads], 1)
    nothing = written.new_zeros(len(written), 0)
    if layer is None:
        return shares, totals, readings, nothing, nothing
    at, model = run.layers[layer], run.model
    own = reads_own_heads(model, layer)
    stream = at.entering + (at.result.sum(2) + at.bias + at.mixer if own else 0)
    each = torch.stack([run.layers[h.layer].result[:, position, h.head] for h in named], 1)
    rest = stream[:, position] - each.sum(1)
    return shares, totals, readings, torch.cat([each, rest[:, None]], 1), at.mlp[:, position]


def _named(model: HookedModel, layer: int, heads: HeadNames) -> list[Head]:
    """The heads that get a weight. AnalysisError where the MLP of the layer does not read one of them."""
    if layer not in model.layers:
        raise AnalysisError(
            f"layer={layer} is not in {model.name}; give one from {model.layers[0]} to {model.layers[-1]}"
        )
    own = reads_own_heads(model, layer)
    read = [number for number in model.layers if number < layer or (own and number == layer)]
    side = "" if own else f", since attention and MLP of {model.name} read the same stream side by side"
    if isinstance(heads, str) and heads in (UPSTREAM, LAYER):
        found = every_head(read if heads == UPSTREAM else [layer], model.n_heads)
    else:
        found = named(heads, model.layers, model.n_heads)
    if late := [str(head) for head in found if head.layer not in read]:
        raise AnalysisError(
            f"the MLP of layer {layer} does not read {', '.join(late)}{side}; name heads before it"
        )
    if not found:
        raise AnalysisError(f"the MLP of layer {layer} reads no head{side}; give a later layer")
    return found


def _with_interval(
    name: str, dims: tuple[str, ...], values: np.ndarray, draws: int, seed: int
) -> dict[str, Any]:
    """Values of every text, their mean over texts and its bounds."""
    names = [f"{name}_{bound}" for bound in ("mean", "low", "high")]
    return {f"{name}_share": (("batch", *dims), values), **intervals(values, dims, draws, seed, names)}


def _fitted(rows: list[_Text], named: list[Head], out: np.ndarray, draws: int, seed: int) -> xr.Dataset:
    """The fit on the texts that are not held out, applied to all texts."""
    terms, mlp = (torch.stack([getattr(text, name) for text in rows]).numpy() for name in ("terms", "mlp"))
    reading = torch.stack([text.reading for text in rows]).numpy()
    fit = ScalarFit.of(terms[~out], mlp[~out])
    low, high = fit.bounds(terms[~out], mlp[~out], draws, seed)
    parts = fit.parts(terms)
    guess = parts.sum(1) + fit.intercept
    whole = np.concatenate(
        [parts, np.broadcast_to(fit.intercept, guess.shape)[:, None], (mlp - guess)[:, None]], 1
    )
    measures = ("part", "measure")
    shares = _with_interval("part", measures, np.einsum("ptd,pmd->ptm", whole, reading), draws, seed)
    names = [*map(str, named), RESIDUAL]
    return xr.Dataset(
        {
            "weight": ("term", fit.weight), "weight_low": ("term", low), "weight_high": ("term", high),
            "inflation": ("term", fit.inflation), "verdict": ("term", _verdicts(low, high)),
            "intercept": ("coordinate", fit.intercept),
            "r_squared": ("half", [fit.explained(terms[side], mlp[side]) for side in (~out, out)]),
            "shuffled_r_squared": ("control", _shuffled(terms, mlp, out, seed)),
            "cosine": ("batch", _cosine(guess, mlp)), "cosine_of_mean": ("batch", _cosine(fit.mean[None], mlp)),
            "mlp_share": (("batch", "measure"), np.einsum("pd,pmd->pm", mlp, reading)),
            **shares,
        },
        coords={
            "term": names, "part": [*names, INTERCEPT, ERROR], "half": list(HALVES),
            "side": ("batch", np.where(out, HALVES[1], HALVES[0])),
        },
        attrs={"condition": fit.condition},
    )  # fmt: skip


def _verdicts(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """The verdict that each weight's interval allows; comparisons with NaN are false."""
    erased = (low >= -1 - ERASED) & (high <= -1 + ERASED)
    return np.select([low > 0, erased, high < 0], ["amplified", "erased", "damped"], "open")


def _shuffled(terms: np.ndarray, mlp: np.ndarray, out: np.ndarray, seed: int) -> list[float]:
    """Held-out R² of fits in which every text has the terms of another text of its half."""
    generator = np.random.default_rng(seed)
    found = []
    for _ in range(CONTROLS):
        moved = terms.copy()
        for side in (~out, out):
            order = generator.permutation(np.flatnonzero(side))
            moved[order] = terms[np.roll(order, 1)]
        found.append(ScalarFit.of(moved[~out], mlp[~out]).explained(moved[out], mlp[out]))
    return found


def _cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """[text]; NaN where one of the two is 0."""
    length = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    return np.where(length > 0, (a * b).sum(-1) / np.where(length > 0, length, 1.0), np.nan)
