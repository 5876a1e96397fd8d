"""The effect of edges or nodes one by one: a forward pass for each, many passes at once, of all or of some drawn."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor

from headwater.analyses._streams.component_graph import Wiring
from headwater.analyses.circuits._counterfactuals import Case, changed
from headwater.analyses.circuits._finished_scores import Finished
from headwater.lens.errors import AnalysisError
from headwater.lens.progress import progress

MOST = 20_000  # edges or nodes
ROWS = 64  # prompts in one forward pass
SOON = 10.0  # seconds; a longer run says before it begins how long it will take


def drawn(wiring: Wiring, level: str, sample: int | None, seed: int) -> Tensor:
    """Which edges [node, input] or nodes [node] are measured, bool: all, or `sample` of them."""
    known = torch.ones(len(wiring.senders), dtype=torch.bool) if level == "node" else wiring.edges()
    places = known.nonzero()
    if sample is None or sample >= len(places):
        return known
    picked = np.random.default_rng(seed).choice(len(places), sample, replace=False)
    found = torch.zeros_like(known)
    found[tuple(places[torch.from_numpy(picked)].T)] = True
    return found


def exact_scores(wiring: Wiring, cases: list[Case], measured: Tensor, finished: Finished) -> Tensor:
    """The drop of the measure of each pair when one place of `measured` is changed, [pair, *measured]; 0 elsewhere.

    Places that share an input run together. The first pass is timed, and the bar says how long all of them will take.
    """
    places = measured.nonzero() if measured.ndim == 1 else measured.T.nonzero().flip(1)
    scores = torch.zeros(sum(len(case.pairs.places) for case in cases), *measured.shape, dtype=torch.float64)
    runs: list[tuple[Case, int, Tensor]] = []
    for case in cases:
        size = max(1, ROWS // len(case.pairs.places))
        runs += [(case, start, places[start : start + size]) for start in range(0, len(places), size)]
    what = "nodes" if measured.ndim == 1 else "edges"
    if len(places) > MOST:
        seconds = len(runs) * _timed(partial(_drops, wiring, runs[0][0], runs[0][2]))
        raise AnalysisError(
            f'{wiring.model.name} has {len(places)} {what} and how="exact" runs each of them, {span(seconds)} on this '
            f'machine; it takes {MOST} at most, so give sample=1000, for as many of them, or how="inputs"'
        )

    def keep(run: tuple[Case, int, Tensor]) -> None:
        case, start, some = run
        drops = finished.scores(f"{start}", case, partial(_drops, wiring, case, some))
        scores[(torch.tensor(case.pairs.places)[:, None], *some.T)] = drops.T

    left = [run for run in runs if not finished.holds(f"{run[1]}", run[0])]
    timed = left[0] if left else None
    seconds = len(left) * _timed(partial(keep, timed)) if timed else 0.0
    long = f", {span(seconds)}" if seconds > SOON else ""
    for run in progress(runs, desc=f"{len(places)} {what} one by one{long}", unit="run"):
        if run is not timed:
            keep(run)
    return scores


def _drops(wiring: Wiring, case: Case, some: Tensor) -> Tensor:
    """The drop of the measure [change, pair] of each place of `some` [change, 1 or 2]: a node, or node and input."""
    known = wiring.edges()
    masks = torch.zeros(len(some), *known.shape, dtype=torch.bool)
    masks[(torch.arange(len(some)), *some.T)] = True
    return case.told.clean - changed(wiring, case, masks & known).double().cpu()


def _timed(call: Callable[[], object]) -> float:
    """The seconds that a call takes."""
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def span(seconds: float) -> str:
    """A time in words: "about 12 minutes"."""
    size, name = next(
        (size, name)
        for size, name in ((3600, "hours"), (60, "minutes"), (1, "seconds"))
        if seconds >= 2 * size or size == 1
    )
    return f"about {seconds / size:.0f} {name}"
