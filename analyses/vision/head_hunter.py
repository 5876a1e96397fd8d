"""HeadHunter: the heads whose perturbed run is the best to be guided away from.

Ahn et al. 2025 (arXiv 2506.10978): attention of chosen heads is mixed with the identity, and sampling is guided away
from that run (SoftPAG). A greedy or a beam search chooses the heads by a measure of what comes out.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import xarray as xr

from headwater.analyses._catalogue.analysis import analysis
from headwater.analyses._catalogue.settings import BatchSize, Bounds, Draws, Seed
from headwater.analyses._measures.bootstrap import interval, intervals
from headwater.analyses._measures.measure import AnswerSetting, PositionSetting, WrongSetting
from headwater.analyses.vision._guided_runs import Guided, guided_runs
from headwater.analyses.vision.head_relevance import Pictures
from headwater.lens.errors import AnalysisError
from headwater.lens.journal import Journal
from headwater.lens.model import HookedModel
from headwater.lens.naming.heads import chosen
from headwater.lens.progress import progress
from headwater.lens.records.provenance import provenance

TREATMENTS = ("plain", "chosen", "random", "every")


@analysis
def head_hunter(
    model: HookedModel,
    examples: Any,
    measure: Any = None,
    evaluation: Any = None,
    count: Annotated[int, "heads added in each round (k of the paper)", Bounds(1)] = 3,
    rounds: Annotated[int, "rounds of the search (R)", Bounds(1)] = 1,
    beam: Annotated[int, "sets that are kept after each round; 1: greedy", Bounds(1)] = 1,
    weight: Annotated[float, "w: how far to go away from the perturbed run"] = 3.0,
    amount: Annotated[float, "u: how much of the identity is mixed in", Bounds(0, 1)] = 1.0,
    heads: Annotated[str | Sequence[str], 'heads to search among, such as "0.1"'] = "all",
    answer: AnswerSetting = None,
    wrong: WrongSetting = None,
    position: PositionSetting = -1,
    controls: Annotated[int, "random sets of as many heads", Bounds(1)] = 5,
    pictures: Pictures = 1,
    batch_size: BatchSize = 16,
    draws: Draws = 1000,
    seed: Seed = 0,
    resume: Annotated[str | Path | None, "file of finished runs to resume from; none: no file"] = None,
) -> xr.Dataset:
    """`chosen` [rank]: the heads found; `measure`, `low`, `high` [treatment] of what they give on other examples.

    A' = (1 - u)·A + u·I in a set S of heads is the perturbed run, and ε + w·(ε - ε_S) the guided one: the denoiser's
    output at each step beside the guidance by words, or the logits of a text. Each round measures S with each further
    head alone, on the search examples (`search` [round, layer, head], the mean; NaN for heads of S), and adds the best
    `count`. With `beam` B the B best sets go on: of a set those with the ranks 1 … count, 2 … count + 1 and so on.

    Of a text-to-image model `examples` are prompts, with `pictures` seeds each, and `measure(pictures, prompts)` gives
    a number for each picture; higher is better. Of other models it is `measure(logits)` → [batch], else the
    log-probability of `answer` (less that of `wrong`) at `position`. `evaluation` are other examples; without them
    pictures have the same prompts with other seeds, and texts are judged on the search examples (attribute `judged`).

    Treatments: "plain" is unguided (w = 0), "chosen" the set found, "random" the mean of `controls` sets of as many
    heads, "every" all heads. `gain` [against], `gain_low`, `gain_high`: chosen less the others, paired; 95 % bootstrap
    over examples. `found` is the measure of the set on the search examples, which the search makes too good.
    With `resume` each run is kept in that file, and the same call goes on after an interruption.

    Question: Away from which heads should sampling be guided?
    Unit: that of the measure.
    Source: Ahn et al. 2025, arXiv:2506.10978; checked against the text; beam search and random sets are ours.
    Cost: rounds · beam · heads runs of the search examples, each with one branch more than a plain run.
    Not for: a gain that the search examples alone show; a judge that does not see what guidance spoils.

    >>> import headwater as hw
    >>> model = hw.load("tasks-4l")
    >>> text = "When Mary and John went to the store , John gave a drink to"
    >>> found = hw.analyses.head_hunter(model, text, answer="Mary", heads=["2.0", "2.6", "3.1"], count=1, draws=10)
    >>> found.chosen.values.tolist(), found.treatment.values.tolist()
    (['2.6'], ['plain', 'chosen', 'random', 'every'])
    """
    runs = guided_runs(
        model,
        examples,
        evaluation,
        measure,
        weight,
        amount,
        (answer, wrong, position),
        pictures,
        batch_size,
        seed,
    )
    view = runs.model
    masks = chosen(heads, "all", view.layers, view.n_heads)
    names = [f"{layer}.{head}" for layer in masks for head in masks[layer].nonzero()[:, 0].tolist()]
    if (needed := count * rounds + beam - 1) > len(names):
        raise AnalysisError(
            f"{rounds} rounds of {count} heads with {beam} sets need {needed} heads; there are {len(names)}"
        )
    run = {
        "analysis": "head_hunter", **provenance(model), "examples": runs.told, "weight": weight, "amount": amount,
        "measure": getattr(measure, "__name__", str(measure)), "answer": [answer, wrong, position], "seed": seed,
    }  # fmt: skip
    with Journal.open(resume, run, lambda fault: AnalysisError(f"resume: {fault}")) as journal:
        best, search = _search(runs, journal, names, count, rounds, beam)
        rng = np.random.default_rng(seed)
        random = [rng.permutation(len(names))[: len(best)] for _ in range(controls)]
        sets = [None, best, *([names[n] for n in some] for some in random), names]
        judged = [_kept(runs, journal, each, judge=True) for each in sets]
        own = _kept(runs, journal, best, judge=False)
    table = np.stack([judged[0], judged[1], np.mean(judged[2:-1], 0), judged[-1]], 1)
    gain = interval(table[:, 1:2] - table[:, [0, 2, 3]], draws, seed)
    grid = np.full((rounds, len(view.layers), view.n_heads), np.nan)
    for (at, name), value in search.items():
        layer, head = map(int, name.split("."))
        grid[at, view.layers.index(layer), head] = value
    return xr.Dataset(
        {
            **intervals(table, ["treatment"], draws, seed, ("measure", "low", "high")),
            "per_example": (("treatment", "batch"), table.T),
            **{n: ("against", x) for n, x in zip(("gain", "gain_low", "gain_high"), gain, strict=True)},
            "random": (("control", "batch"), np.stack(judged[2:-1])), "found": float(own.mean()),
            "chosen": ("rank", np.array(best)), "search": (("round", "layer", "head"), grid),
        },
        coords={
            "treatment": list(TREATMENTS), "against": ["plain", "random", "every"], "layer": view.layers,
            "head": np.arange(view.n_heads),
        },
        attrs={"examples": len(table), "judged": runs.judged, "part": view.part_name},
    )  # fmt: skip


def _search(
    runs: Guided, journal: Journal, names: list[str], count: int, rounds: int, beam: int
) -> tuple[list[str], dict[tuple[int, str], float]]:
    """The best set, in the order in which its heads came, and the measure of each head added to the first set."""
    sets: list[list[str]] = [[]]
    search: dict[tuple[int, str], float] = {}
    for at in range(rounds):
        grown: dict[frozenset[str], tuple[float, list[str]]] = {}
        for place, some in enumerate(sets):
            others = [name for name in names if name not in some]
            bar = progress(others, desc=f"head hunter {at + 1}/{rounds}", unit="head")
            value = {name: float(_kept(runs, journal, [*some, name], judge=False).mean()) for name in bar}
            if place == 0:
                search |= {(at, name): each for name, each in value.items()}
            ranked = sorted(others, key=lambda name: -value[name])
            for first in range(beam):
                new = [*some, *ranked[first : first + count]]
                if len(new) == len(some) + count and frozenset(new) not in grown:
                    score = value[new[-1]] if count == 1 else 0.0
                    if count > 1 and beam > 1:
                        score = float(_kept(runs, journal, new, judge=False).mean())
                    grown[frozenset(new)] = (score, new)
        sets = [new for _, new in sorted(grown.values(), key=lambda each: -each[0])[:beam]]
    return sets[0], search


def _kept(runs: Guided, journal: Journal, heads: list[str] | None, judge: bool) -> np.ndarray:
    """The measure of each example under a set of heads, from the journal where it was finished before."""
    told = "plain" if heads is None else " ".join(sorted(heads))
    name = f"{'judge' if judge else 'search'} {told}"
    found = journal.get(name)
    if found is None:
        found = runs.values(heads, judge).tolist()
        journal.put(name, found)
    return np.array(found, np.float64)
