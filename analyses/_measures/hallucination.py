"""Hallucination in numbers: captions that name what pictures do not show (CHAIR), and answers of yes or no (POPE).

For any captions of pictures of which it is known what is there. Intervals come from captions or questions resampled
with replacement; a second list of the same pictures gives the paired change.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Sequence

import numpy as np
import xarray as xr

from headwater.analyses._measures.bootstrap import bounds, redraws
from headwater.lens.errors import AnalysisError

Said = Sequence[bool | str]


def chair(
    mentioned: Sequence[Sequence[Hashable]], present: Sequence[Collection[Hashable]], *,
    before: Sequence[Sequence[Hashable]] | None = None, draws: int = 2000, seed: int = 0,
) -> xr.Dataset:  # fmt: skip
    """CHAIR (Rohrbach et al., EMNLP 2018) of captions: `mentioned` things in each, `present` things in its picture.

    chair_s: share of captions that name something absent; chair_i: share of the named things that are absent, over all
    captions; recall: share of the present things that are named; things: named per caption. A thing counts as often as
    a caption names it. Dataset [measure]: `value` with the bounds `low` and `high` of 95 %. `before` are other captions
    of the same pictures: `change` is value minus theirs, with `change_low` and `change_high`. NaN where nothing is
    named. AnalysisError for lists of different length.

    >>> import headwater as hw
    >>> found = hw.analyses.chair([["cat", "dog"], ["dog"]], [{"cat"}, {"dog"}])
    >>> found.value.sel(measure=["chair_s", "chair_i", "recall"]).values.round(2).tolist()
    [0.5, 0.33, 1.0]
    """
    parts = {"chair_s": (3, 4), "chair_i": (0, 1), "recall": (2, 5), "things": (1, 4)}
    return _compared(_counts(mentioned, present), None if before is None else _counts(before, present), {
        name: lambda x, top=top, below=below: _ratio(x[..., top].sum(-1), x[..., below].sum(-1))
        for name, (top, below) in parts.items()
    }, draws, seed)  # fmt: skip


def pope(
    said: Said, right: Sequence[bool], *, before: Said | None = None, draws: int = 2000, seed: int = 0
) -> xr.Dataset:
    """POPE (Li et al., EMNLP 2023): answers to "is there a …?"; `right` says whether it is there.

    accuracy, precision, recall and f1 of "yes", and yes_rate. An answer is a bool, or a text, which is "yes" if it
    begins with that word. Dataset [measure] as in `chair`, with `before` for other answers to the same questions.

    >>> import headwater as hw
    >>> found = hw.analyses.pope(["Yes.", "No", "yes"], [True, False, False])
    >>> found.value.sel(measure=["accuracy", "precision", "yes_rate"]).values.round(2).tolist()
    [0.67, 0.5, 0.67]
    """
    measures: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "accuracy": lambda x: (x[..., 0] == x[..., 1]).mean(-1),
        "precision": lambda x: _ratio(x.all(-1).sum(-1), x[..., 0].sum(-1)),
        "recall": lambda x: _ratio(x.all(-1).sum(-1), x[..., 1].sum(-1)),
        "f1": lambda x: _ratio(2 * x.all(-1).sum(-1), x.sum((-2, -1))),
        "yes_rate": lambda x: x[..., 0].mean(-1),
    }
    return _compared(
        _answers(said, right), None if before is None else _answers(before, right), measures, draws, seed
    )


def _counts(mentioned: Sequence[Sequence[Hashable]], present: Sequence[Collection[Hashable]]) -> np.ndarray:
    """Of each caption: absent mentions, mentions, present things named, whether one is absent, 1, present things."""
    _refuse_unequal(mentioned, present, "captions", "pictures")
    rows = []
    for named, there in zip(mentioned, present, strict=True):
        wrong = sum(thing not in there for thing in named)
        rows.append([wrong, len(named), len({*named} & {*there}), wrong > 0, 1, len(there)])
    return np.array(rows, dtype=float)


def _answers(said: Said, right: Sequence[bool]) -> np.ndarray:
    """[question, (said yes, is there)]."""
    _refuse_unequal(said, right, "answers", "questions")
    yes = [each.strip().lower().startswith("yes") if isinstance(each, str) else bool(each) for each in said]
    return np.array([yes, [bool(each) for each in right]]).T


def _compared(
    rows: np.ndarray, before: np.ndarray | None, measures: dict[str, Callable[[np.ndarray], np.ndarray]],
    draws: int, seed: int,
) -> xr.Dataset:  # fmt: skip
    """Each measure of rows [row, …] with its bounds, and its change from `before`, over the same resamples."""
    picks = redraws(len(rows), draws, seed)
    found: dict[str, list[float]] = {"value": [], "low": [], "high": []}
    if before is not None:
        found |= {"change": [], "change_low": [], "change_high": []}
    for of in measures.values():
        drawn = of(rows[picks])
        _add(found, "value", "", float(of(rows)), drawn)
        if before is not None:
            _add(found, "change", "change_", float(of(rows) - of(before)), drawn - of(before[picks]))
    return xr.Dataset(
        {name: ("measure", values) for name, values in found.items()},
        coords={"measure": list(measures)},
        attrs={"examples": len(rows)},
    )


def _add(found: dict[str, list[float]], name: str, prefix: str, value: float, drawn: np.ndarray) -> None:
    known = drawn[np.isfinite(drawn)]
    low, high = bounds(known) if len(known) else (np.nan, np.nan)
    found[name].append(value)
    found[f"{prefix}low"].append(float(low))
    found[f"{prefix}high"].append(float(high))


def _ratio(top: np.ndarray, below: np.ndarray) -> np.ndarray:
    top, below = np.asarray(top, dtype=float), np.asarray(below, dtype=float)
    return np.where(below > 0, top / np.where(below > 0, below, 1), np.nan)


def _refuse_unequal(one: Sequence, other: Sequence, what: str, of: str) -> None:
    if len(one) != len(other) or not len(one):
        raise AnalysisError(f"{len(one)} {what} for {len(other)} {of}; give as many, and at least one")
