"""Ordered weakening: the pictures while heads of cross-attention are weakened, the most relevant ones first or last.

Park et al. 2024 (arXiv 2412.02237) test head relevance vectors so: a concept must go faster in the order of its vector
than in the other direction. Random orders are controls.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import numpy as np
import xarray as xr

from headwater.analyses._catalogue.analysis import analysis
from headwater.analyses._catalogue.settings import BatchSize, Bounds, Draws, Seed
from headwater.analyses._measures.bootstrap import interval, intervals
from headwater.analyses.vision._drawings import (
    Pair,
    PictureMeasure,
    check_draws,
    drawn,
    measured,
    pairs_of,
    part_of,
    pixels,
)
from headwater.analyses.vision.head_relevance import Concepts, Pictures, head_relevance
from headwater.lens.diffusion.model import DiffusionModel
from headwater.lens.edits.at_steps import AtSteps
from headwater.lens.edits.heads import ScaleHeads
from headwater.lens.edits.weights import ScaleWeights
from headwater.lens.errors import AnalysisError, nearest
from headwater.lens.model import HookedModel
from headwater.lens.progress import progress
from headwater.lens.running.denoising import CONDITIONAL

MOST, LEAST = "most first", "least first"


@analysis
def head_weakening(
    model: HookedModel,
    examples: Any,
    concept: Annotated[str, "concept by whose vector the heads are ordered"],
    measure: PictureMeasure | None = None,
    relevance: Any = None,
    concepts: Annotated[Concepts | None, "where relevance is none: as in head_relevance"] = None,
    factor: Annotated[float, "what the weights of weakened heads are multiplied by"] = -2.0,
    keys: Annotated[
        Literal["all", "words"], "weights that are multiplied: all, or without the first token's"
    ] = "all",
    step: Annotated[int, "heads that are weakened more at each point of the curve", Bounds(1)] = 4,
    controls: Annotated[int, "random orders", Bounds(0)] = 3,
    pictures: Pictures = 1,
    batch_size: BatchSize = 16,
    draws: Draws = 1000,
    seed: Seed = 0,
) -> xr.Dataset:
    """`measure`, `low` and `high` [order, heads] of the pictures while 0, `step`, 2·`step` … heads are weakened.

    The maps of a weakened head are multiplied by `factor`, in the branch with words, at every step. Orders: "most
    first" by the relevance of `concept`, "least first", and "random 0" and so on. `relevance` is what `head_relevance`
    gives; without it that is computed from `concepts` on the same prompts. `measure(pictures, prompts)` gives a number
    for each picture, such as 1 where a judge reads the concept as told; without one it is 1 - mean |difference| of the
    pixels to the picture without edits. Intervals: 95 % bootstrap over pictures; `per_example` [order, heads, batch].

    `area` [order]: mean over the points of the curve. `gap` [against]: the area of "least first", and of the mean of
    the random orders, less that of "most first", with `gap_low` and `gap_high` paired over pictures: above 0 where the
    vector finds the heads of the concept. `ranked` [rank]: the heads, the most relevant first.

    Question: Does a concept leave the picture first where its heads are weakened first?
    Unit: that of the measure.
    Source: Park et al. 2024, arXiv:2412.02237; the authors' code multiplies the weights on words alone (keys="words").
    Cost: (2 + controls) · (heads / step + 1) pictures for each prompt and picture.
    Not for: heads of one concept that are relevant for another one too, whose pictures change in both orders.

    >>> import headwater as hw
    >>> model = hw.load("t2i-digits")
    >>> concepts = {"digit": "bright {one|two} left", "place": "bright one {left|right}"}
    >>> found = hw.analyses.head_weakening(
    ...     model, "bright two left", "digit", concepts=concepts, step=24, controls=1, draws=10)
    >>> found.measure.sizes["order"], found.heads.values.tolist(), float(found.measure[0, 0])
    (3, [0, 24], 1.0)
    """
    view = part_of(check_draws(model, "head_weakening"), "head_weakening", crosses=True)
    if relevance is None:
        if concepts is None:
            raise AnalysisError(
                "head_weakening orders heads by relevance= (a result of head_relevance) or concepts="
            )
        relevance = head_relevance(model, examples, concepts=concepts, pictures=pictures, draws=1, seed=seed)
    ranked = _ranked(relevance, concept, view)
    names = [f"{layer}.{head}" for layer in view.layers for head in range(view.n_heads)]
    counts = [*range(0, len(names), step), len(names)]
    orders = {MOST: ranked, LEAST: ranked[::-1]} | {
        f"random {n}": np.random.default_rng([seed, n]).permutation(len(names)) for n in range(controls)
    }
    pairs = pairs_of(examples, pictures, seed)
    plain = drawn(view, pairs, batch_size)
    judge = measure if measure is not None else _likeness(plain)
    without = measured(judge, plain, pairs)
    known: dict[frozenset[int], np.ndarray] = {frozenset(): without}

    def value(heads: frozenset[int]) -> np.ndarray:
        if heads not in known:
            edits = _weakened([names[n] for n in sorted(heads)], factor, keys)
            known[heads] = measured(judge, _edited(view, edits, pairs, batch_size), pairs)
        return known[heads]

    every = [(order, count) for order in orders.values() for count in counts]
    bar = progress(every, desc="head weakening", unit="point")
    table = np.stack([value(frozenset(order[:count].tolist())) for order, count in bar])
    table = table.reshape(len(orders), len(counts), -1)
    area = np.moveaxis(table.mean(1), -1, 0)  # [batch, order]
    others = [area[:, 1], *([area[:, 2:].mean(1)] if controls else [])]
    gap = interval(np.stack(others, 1) - area[:, :1], draws, seed)
    dims = ("order", "heads")
    return xr.Dataset(
        {
            **intervals(np.moveaxis(table, -1, 0), dims, draws, seed, ("measure", "low", "high")),
            "per_example": ((*dims, "batch"), table), "area": ("order", area.mean(0)),
            **{name: ("against", x) for name, x in zip(("gap", "gap_low", "gap_high"), gap, strict=True)},
            "ranked": ("rank", np.array(names)[ranked]),
        },
        coords={
            "order": list(orders), "heads": counts, "batch": np.arange(len(pairs)),
            "against": [LEAST, *(["random"] if controls else [])],
        },
        attrs={"examples": len(pairs), "part": view.part_name},
    )  # fmt: skip


def _ranked(relevance: Any, concept: str, model: DiffusionModel) -> np.ndarray:
    """The places of the heads, the most relevant for a concept first."""
    vectors = relevance["relevance"] if isinstance(relevance, xr.Dataset) else relevance
    wanted = (len(model.layers), model.n_heads)
    if not isinstance(vectors, xr.DataArray) or vectors.dims != ("concept", "layer", "head"):
        raise AnalysisError("relevance is what head_relevance gives, with axes concept, layer and head")
    if concept not in (known := vectors.concept.values.tolist()):
        raise AnalysisError(f"no concept {concept!r} in the relevance: {nearest(concept, known)}")
    if vectors.shape[1:] != wanted:
        raise AnalysisError(
            f"the relevance is of {vectors.shape[1:]} layers and heads, the model has {wanted}"
        )
    return np.argsort(-vectors.sel(concept=concept).values.ravel(), kind="stable")


def _weakened(heads: list[str], factor: float, keys: str) -> list[AtSteps]:
    changed = (
        ScaleHeads(dict.fromkeys(heads, factor))
        if keys == "all"
        else ScaleWeights(slice(1, None), factor, heads=heads)
    )
    return [AtSteps(changed, branch=CONDITIONAL)]


def _edited(model: DiffusionModel, edits: list[AtSteps], pairs: list[Pair], size: int) -> list[Any]:
    with model.edit(*edits):
        return drawn(model, pairs, size)


def _likeness(plain: list[Any]) -> PictureMeasure:
    """1 - mean |difference| of the pixels to the pictures that were drawn without edits."""
    before = [pixels(picture) for picture in plain]

    def likeness(pictures: list[Any], prompts: list[str]) -> list[float]:
        after = map(pixels, pictures)
        return [1 - float(np.abs(x - y).mean()) for x, y in zip(after, before, strict=True)]

    return likeness
