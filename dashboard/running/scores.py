"""The numbers per head that the page Heads can show, each with its unit, its meaning and what it costs.

Row statistics are means over the tokens after the first: in a causal model the first token sees only itself, and
its row would lift every head alike.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import xarray as xr

from headwater.analyses._catalogue.catalogue import entry
from headwater.analyses.heads.head_roles import ROLES
from headwater.analyses.sinks._received_share import received_share
from headwater.dashboard.running.measure import Measure
from headwater.dashboard.running.runs import Run

LEAST_ROLE = 0.3  # share of the weight outside the sink from which a head is named by a role


@dataclass(frozen=True)
class Score:
    """One number per head. `source` says what it is read from: the record of the run, a job on the measure, roles."""

    label: str
    unit: str
    meaning: str
    cost: str
    source: str
    not_for: str = ""


STATISTICS = {
    "previous": ("Attention to the previous token", "share", "mean weight on the token just before"),
    "self": ("Attention to itself", "share", "mean weight of a token on its own position"),
    "max": (
        "Strongest weight",
        "share",
        "mean of each token's largest weight; 1: it looks at one token only",
    ),
    "entropy": ("Entropy", "nats", "how widely a token spreads its attention, 0: on one token only"),
    "distance": ("Distance", "tokens", "mean distance between a token and what it attends to"),
}
SQUARE = (
    "previous",
    "self",
    "distance",
)  # mean something where queries and keys are the same tokens in a line
MEANINGS = {
    "previous": "weight on the token before",
    "duplicate": "weight on the same token's earlier place",
    "induction": "weight on what followed the same token before",
    "prefix_matching": "weight on all that followed the same token before",
    "first": "weight on the first token",
    "copying": "eigenvalues of the OV circuit that raise the token they read, -1 to 1",
    "positional": "likeness of the maps of two random texts; 1: only positions matter",
    "broad": "entropy over that of an even spread",
    "narrow": "largest weight of a row",
    "delimiter": "weight on delimiters",
}
NAMED = ("previous", "duplicate", "induction", "delimiter")  # roles that a head is called by


def effects_of(run: Run, measure: Measure) -> dict[str, Score]:
    """The ways to ask what a head does to the measure, the first the one to begin with."""
    if measure.kind == "none":
        return {}
    falls = f"fall of {measure.label}" if measure.better > 0 else f"rise of the {measure.label}"
    importance, direct = entry("head_importance"), entry("direct_logit_attribution")
    unit = measure.unit
    found = {
        "ablation": Score(
            "Effect on the measure: without the head", unit,
            f"{falls} when the head's output is set to zero; above 0 the head helps", importance.cost, "effect",
            importance.not_for,
        ),
        "mean": Score(
            "Effect on the measure: the head at its mean", unit,
            f"{falls} when the head's output is its mean over the tokens; above 0 what varies in it helps",
            importance.cost, "effect", importance.not_for,
        ),
    }  # fmt: skip
    if measure.kind != "likeness":  # it is at its largest, and its slope 0
        found["gradient"] = Score(
            "Effect on the measure: by gradient", unit,
            f"{falls} when the head is set to zero, estimated by the slope at its gate; above 0 the head helps",
            importance.cost, "effect", importance.not_for,
        )  # fmt: skip
    if measure.answer is not None or measure.kind == "match":
        of = "the difference of the two logits" if measure.kind == "difference" else "the logit of the answer"
        of = "the similarity" if measure.kind == "match" else of
        found["direct"] = Score(
            "Effect on the measure: written directly", "" if measure.kind == "match" else "logit",
            f"what the head itself writes into {of}, not by way of later layers", direct.cost, "effect",
            direct.not_for,
        )  # fmt: skip
    return found


def offered(run: Run, measure: Measure, roles: bool) -> dict[str, Score]:
    """The scores that say something of a run; those of `roles` need a causal model of texts."""
    read = "nothing: recorded with the run"
    found = effects_of(run, measure)
    name, meaning = "the first token", "mean weight that tokens give to the first token"
    if not run.causal:
        name, meaning = "one token", "the largest mean weight that one token gets"
    found["sink"] = Score(
        f"Share on {name}", "share", f"{meaning}; above 0.3 it is counted as an attention sink", read, "record",
        entry("sink_rate").not_for,
    )  # fmt: skip
    along = run.square and "previous" in run.record.statistics
    for each, (label, unit, meaning) in STATISTICS.items():
        if each in run.record.statistics and (along or each not in SQUARE):
            found[each] = Score(label, unit, meaning, read, "record")
    if roles:
        about = entry("head_roles")
        for role in ROLES:
            unit = "" if role in ("copying", "positional", "broad") else "share"
            label = f"Role: {role.replace('_', ' ')}"
            meaning = f"on repeated random tokens, {MEANINGS[role]}" if role != "copying" else MEANINGS[role]
            found[f"role_{role}"] = Score(label, unit, meaning, about.cost, "roles", about.not_for)
    return found


def of_record(name: str, run: Run) -> xr.DataArray:
    """A score that is read from the record, [layer, head]."""
    if name == "sink":
        share = received_share(run.record).isel(batch=0)
        return share.isel(key=0, drop=True) if run.causal else share.max("key")
    values = run.record.statistic(name).isel(batch=0)
    rows = slice(1, None) if run.causal and values.sizes["query"] > 1 else slice(None)
    return values.isel(query=rows).mean("query", skipna=True)


def role_names(roles: xr.DataArray) -> np.ndarray:
    """What each head does with the weight that is not on the first token, [layer, head]: "induction 0.92", or "".

    A head with less than a tenth of its weight elsewhere is a "sink".
    """
    shares = roles.sel(role=list(NAMED)).transpose("layer", "head", "role").values
    elsewhere = 1 - roles.sel(role="first").transpose("layer", "head").values
    best = shares.argmax(-1)
    share = shares.max(-1) / np.maximum(elsewhere, 1e-9)
    found = np.full(best.shape, "", dtype=object)
    for place in np.ndindex(best.shape):
        if elsewhere[place] < 0.1:
            found[place] = "sink"
        elif share[place] >= LEAST_ROLE:
            found[place] = f"{NAMED[best[place]]} {share[place]:.2f}"
    return found
