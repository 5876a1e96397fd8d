"""Suppressors: parts of the last layer that lower the logit of the token that was about to be predicted, and the
prediction when they are scaled down.

The anti-overconfidence of Lv et al. 2024 (arXiv 2403.19521). Parts are chosen on one half of the texts. Scaling them,
an edit that can be saved, is judged on the other half beside random heads of the same layer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from typing import Annotated, Literal

import numpy as np
import torch
import xarray as xr
from scipy.stats import binomtest
from torch import Tensor

from headwater.analyses._catalogue.analysis import analysis
from headwater.analyses._catalogue.settings import BatchSize, Bounds, checked
from headwater.analyses._measures.bootstrap import corrected_p, interval
from headwater.analyses._measures.measure import AnswerSetting, Explained, PositionSetting
from headwater.analyses._prompts.examples import Batch, Examples
from headwater.analyses._prompts.positions import place_of
from headwater.analyses._prompts.texts import Texts
from headwater.analyses._streams.ending import at
from headwater.analyses._streams.readout import Readout, soft_cap
from headwater.analyses._streams.writers import Writers
from headwater.analyses.logits._answer_position import (
    answers_of,
    halves,
    less_the_mean,
    once,
    refuse_without_logits,
    tokens_of,
)
from headwater.lens.edits.base import Edit
from headwater.lens.edits.heads import ScaleHeads
from headwater.lens.edits.residual import EditMLP
from headwater.lens.errors import AnalysisError
from headwater.lens.model import HookedModel
from headwater.lens.progress import progress

CHOSEN, JUDGED = "chosen on", "judged on"
MEASURES = ("accuracy", "probability", "logit", "loss")
TOGETHER = "together"
OWN = re.compile(r"(mlp|\d+)\.\d+")  # heads and MLPs of the model's part
Against = Literal["mean", "nothing"]


@analysis
def suppressors(
    model: HookedModel,
    examples: Examples,
    answer: AnswerSetting = None,
    factors: Annotated[str | Sequence[float], "what a suppressor is multiplied by"] = (0.0, 0.5, 1.0),
    against: Annotated[
        Against, "what the token's logit is compared with: the mean of all, or nothing"
    ] = "mean",
    level: Annotated[
        float, "corrected p of the sign test below which a part counts", Bounds(0.0, 1.0)
    ] = 0.05,
    least: Annotated[float, "logits that a part must take away in the mean", Bounds(0.0)] = 0.01,
    controls: Annotated[int, "sets of random heads of the layer that are scaled too", Bounds(0)] = 3,
    position: PositionSetting = -1,
    draws: Annotated[int, "redrawings of the texts for the intervals", Bounds(100)] = 1000,
    seed: Annotated[int, "seed of the halves, the random heads and the redrawings", Bounds(0)] = 0,
    batch_size: BatchSize = 16,
) -> xr.Dataset:
    """Direct logit attribution of the last layer's parts c on t, the likeliest token of the stream x before that layer.

    `t = argmax W_U·norm(x)` per text at `position`, as the logit lens reads x.
    `share_c = ((c - mean(c))/s ⊙ g)·(W_U[t] - mean W_U)`, with s the scale behind the layer. `against="nothing"` takes
    W_U[t] alone, as the paper does, but no softmax sees what all tokens gain alike. Over the half "chosen on" (`side`)
    of the different texts: `mean`, `low`, `high` (95 % bootstrap), `negative` (fraction of texts), `p` of a two-sided
    exact sign test and `p_corrected` (Holm over the parts), all [component]; `share` [batch, component] is of all
    texts. A `suppressor` is a head or MLP with `high < 0`, `mean <= -least` and `p_corrected < level`, which a handful
    of texts never reaches.

    Over the half "judged on", three kinds of sets are multiplied by each of the `factors`: each suppressor alone, all
    "together", and `controls` sets of as many random other heads of the layer ("control 0" …; one head where only the
    MLP is a suppressor; fewer where few are left). `value` [measure, judged, scaled, factor] are the measures; `change`
    with `change_low`, `change_high` [measure, scaled, factor] are paired differences from the unscaled model. Measures
    of `answer` (none: what the model predicts): accuracy, probability, logit (as the model gives it), loss = -log
    probability. The attribute `members` names the parts of each set; `mitigation(result, scaled, factor)` gives the
    edits. Models whose norms stand behind the sum are refused (BERT).

    Question: Which parts of the last layer lower the logit of what the model was about to say?
    Unit: logit (before a soft cap) less the mean over the vocabulary; accuracy; probability; loss in nats.
    Source: Lv et al. 2024, arXiv:2403.19521; idea from its abstract and memory; less the mean, halves and tests are
    ours.
    Cost: one forward pass, then one per scaled set and factor on half of the texts.
    Not for: that a part is there to suppress: it may write something else that this token loses by.

    >>> import headwater as hw, torch
    >>> texts = torch.arange(5, 365).view(-1, 3)  # 120 texts of 3 tokens
    >>> found = hw.analyses.suppressors(hw.load("tasks-4l"), texts, factors="0.5", draws=100, batch_size=64)
    >>> found.component.values[found.suppressor.values].tolist()
    ['3.3', 'mlp.3']
    """
    scales = _numbers(factors)
    refuse_without_logits(model)
    explained = Explained(
        model, None, tokens_of(model, answer, "answer"), None, position, "logit", of_classes=True
    )
    texts = Texts.of(model, examples, batch_size)
    batches = once(texts.batches)
    rows: dict[int, tuple[Tensor, int, int]] = {}
    names: list[str] = []
    for batch in progress(batches, desc="suppressors", unit="batch"):
        place_of(position, texts.length(batch), f"example {batch.places[0]}")
        run = Writers.of(model, batch)
        names, shares, before = _shares(run, position, against)
        asked, _ = answers_of(explained, run, batch)
        assert asked is not None
        rows |= dict(
            zip(batch.places, zip(shares, before.tolist(), asked.tolist(), strict=True), strict=True)
        )
    places = sorted(rows)
    share = torch.stack([rows[place][0] for place in places]).numpy()
    judged = halves(places, seed)
    found = _tested(share[~judged], draws, seed)
    chosen = _chosen(found, names, level, least)
    named = np.array(names)[chosen].tolist()
    members = _sets(model, named, controls, seed)
    answers = {place: rows[place][2] for place in places}
    kept = np.array(places)[judged].tolist()
    values = _judged(model, batches, answers, kept, members, scales, position)
    base, values = values[:, :, 0, 0], values[:, :, 1:]
    moved = (values - base[..., None, None]).swapaxes(0, 1)
    change = interval(moved, draws, seed) if members else (moved.mean(0),) * 3
    dims = ("measure", "scaled", "factor")
    tokens = [rows[place][1] for place in places]
    result = xr.Dataset(
        {
            "share": (("batch", "component"), share), **{n: ("component", v) for n, v in found.items()},
            "suppressor": ("component", chosen),
            "base": (("measure", "judged"), base), "value": (("measure", "judged", "scaled", "factor"), values),
            **{n: (dims, v) for n, v in zip(("change", "change_low", "change_high"), change, strict=True)},
        },
        coords={
            "batch": places, "component": names, "measure": list(MEASURES), "judged": kept, "factor": scales,
            "scaled": np.array(list(members), dtype=str), "token": ("batch", tokens),
            "token_text": ("batch", _named(model, tokens)),
            "answer": ("batch", _named(model, answers.values())),
            "side": ("batch", np.where(judged, JUDGED, CHOSEN)),
        },
    )  # fmt: skip
    if not members:  # netCDF takes an axis of length 0 in the first place alone
        result = result.transpose("scaled", ...)
    return result.assign_attrs({"soft_cap": soft_cap(model), "texts": len(places), "members": members})


@checked
def mitigation(found: xr.Dataset, scaled: str = TOGETHER, factor: float = 0.5) -> list[Edit]:
    """The edits that multiply the parts of one set, for `with model.edit(*edits):`; `to_dict()` of each can be saved.

    >>> import headwater as hw, torch
    >>> texts = torch.arange(5, 365).view(-1, 3)  # 120 texts of 3 tokens
    >>> found = hw.analyses.suppressors(hw.load("tasks-4l"), texts, factors="0.5", draws=100, batch_size=64)
    >>> hw.analyses.mitigation(found, "3.3", factor=0.5)
    [ScaleHeads(factors={'3.3': 0.5}, rows='all')]
    """
    members = json.loads(found.attrs["members"])
    if scaled not in members:
        raise AnalysisError(f"no set {scaled!r} was scaled; there are {', '.join(members) or 'none'}")
    return _edits(members[scaled], factor)


def _named(model: HookedModel, ids: Iterable[int]) -> list[str]:
    """Tokens, or classes, in words."""
    return model.to_strings(ids) if model.has_lm_head else [model.classes[n] for n in ids]


def _numbers(given: str | Sequence[float]) -> list[float]:
    """The factors, from numbers or from text."""
    try:
        listed = given.replace(",", " ").split() if isinstance(given, str) else list(given)
        found = [float(one) for one in listed]
    except (TypeError, ValueError):
        found = []
    if not found or not np.isfinite(found).all() or len(set(found)) < len(found):
        raise AnalysisError(f"factors={given!r} are not different numbers; give some, such as 0, 0.5, 1")
    return found


def _edits(members: Sequence[str], factor: float) -> list[Edit]:
    heads = [name for name in members if not name.startswith("mlp.")]
    layers = [int(name.removeprefix("mlp.")) for name in members if name.startswith("mlp.")]
    found: list[Edit] = [ScaleHeads(dict.fromkeys(heads, factor))] if heads else []
    return found + [EditMLP(layer, "scale", factor) for layer in layers]


def _shares(run: Writers, position: int, against: Against) -> tuple[list[str], Tensor, Tensor]:
    """Names of the last layer's parts, their shares [batch, component], and the likeliest token before the layer."""
    number, layer = list(run.layers.items())[-1]
    places = run.at(position)
    token = run.end.read(at(layer.entering, places).to(run.model.dtype)).argmax(-1)
    readout = Readout.of(run, position, token, None)
    readout = less_the_mean(run, position, readout) if against == "mean" else readout
    parts = {name: at(vectors, places) for name, vectors in run.terms[number].items()}
    return list(parts), torch.stack([readout.shares(part) for part in parts.values()], -1).cpu(), token


def _tested(share: np.ndarray, draws: int, seed: int) -> dict[str, np.ndarray]:
    """Statistics of each part over the texts that are chosen on, [component]."""
    mean, low, high = interval(share, draws, seed)
    below, above = (share < 0).sum(0), (share > 0).sum(0)
    # a sign test without any sign has p = 1
    p = np.array(
        [binomtest(b, n).pvalue if n else 1.0 for b, n in np.stack([below, below + above], 1).tolist()]
    )
    told = {"mean": mean, "low": low, "high": high, "negative": below / len(share), "p": p}
    return told | {"p_corrected": corrected_p(p, "holm")}


def _chosen(found: dict[str, np.ndarray], names: list[str], level: float, least: float) -> np.ndarray:
    """Which parts are suppressors, bool [component]. Biases, mixers and another part's heads are not scaled."""
    parts = np.array([OWN.fullmatch(name) is not None for name in names])
    below = (found["mean"] <= -least) & (found["high"] < 0)
    return parts & below & (found["p_corrected"] < level)


def _sets(model: HookedModel, named: list[str], controls: int, seed: int) -> dict[str, list[str]]:
    """The parts of each scaled set by its name: each suppressor, all of them, and random heads of the layer."""
    if not named:
        return {}
    found = {name: [name] for name in named}
    if len(named) > 1:
        found[TOGETHER] = named
    last = (f"{model.layers[-1]}.{head}" for head in range(model.n_heads))
    others = [name for name in last if name not in named]
    size = min(len(others), max(1, sum(not name.startswith("mlp.") for name in named)))
    generator = np.random.default_rng(seed)
    for n in range(controls if size else 0):
        picked = np.sort(generator.choice(len(others), size, replace=False))
        found[f"control {n}"] = [others[i] for i in picked]
    return found


def _judged(
    model: HookedModel, batches: list[Batch], answers: dict[int, int], kept: list[int],
    members: dict[str, list[str]], factors: list[float], position: int,
) -> np.ndarray:  # fmt: skip
    """Measures [measure, text, set, factor] of the kept texts; the first set is the unscaled model."""
    found = np.zeros((len(MEASURES), len(kept), 1 + len(members), len(factors)))
    sets = [((), factors[:1]), *((names, factors) for names in members.values())]
    for batch in progress(batches, desc="suppressors scaled", unit="batch"):
        rows = [row for row, place in enumerate(batch.places) if place in kept]
        if not rows:
            continue
        into = [kept.index(batch.places[row]) for row in rows]
        asked = torch.tensor([answers[batch.places[row]] for row in rows])
        for n, (names, scales) in enumerate(sets):
            for m, factor in enumerate(scales):
                with model.edit(*_edits(names, factor)):
                    logits = model(batch.rows(rows))
                row = logits[:, position] if logits.dim() == 3 else logits
                found[:, into, n, m] = _measured(row.double().cpu(), asked)
    return found


def _measured(logits: Tensor, asked: Tensor) -> np.ndarray:
    """[measure, text] of logits [text, vocab]."""
    logit = logits.gather(1, asked[:, None])[:, 0]
    log = logits.log_softmax(-1).gather(1, asked[:, None])[:, 0]
    right = (logits.argmax(-1) == asked).double()
    return torch.stack([right, log.exp(), logit, -log]).numpy()
