"""Activation patching: which activations carry what makes the answer of one prompt differ from that of another?

The method is standard (Wang et al. 2022, arXiv 2211.00593, for heads; Meng et al. 2022 for the stream); numbers agree
with TransformerLens' `patching`. Many cells run at once as copies of the prompts, begun at the layer that is patched,
and only the logits that are read are computed. Cells are tried one at a time: what two of them do together is not seen.
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
import torch
import xarray as xr
from torch import Tensor
from tqdm import tqdm

from headwater.analyses._about import About
from headwater.analyses._cells import Cells, Instead, What
from headwater.analyses._examples import Batch, Examples
from headwater.analyses._measure import PositionSetting
from headwater.analyses._pairs import (
    AnswerOfPairs,
    How,
    Moved,
    PairMeasure,
    Pairs,
    WrongOfPairs,
    measure_settings,
    moved_of,
    pairs_of,
)  # fmt: skip
from headwater.analyses._resuming import Resuming
from headwater.analyses._swapping import Per, Swap, fitting
from headwater.lens.errors import AnalysisError
from headwater.lens.heads import Layers, chosen_layers
from headwater.lens.model import HookedModel
from headwater.lens.record import provenance

ABOUT = About(
    question="Which activations carry what makes two prompts differ?",
    unit="share of the way from the patched run's measure (0) to the other prompt's (1)",
    paper="Wang et al. 2022, arXiv:2211.00593; Meng et al. 2022, arXiv:2202.05262",
    inputs="model+pairs",
    cost="one run per cell from its layer upwards, many cells at once; destination_source has heads·S² cells per layer",
    not_for="cells that stand in for each other; which path an effect takes (path_patch); prompts of unequal length",
)


def patch(
    model: HookedModel,
    clean: Examples,
    corrupt: Examples,
    measure: PairMeasure = "logit_difference",
    what: Annotated[What, "what a cell is"] = "head",
    how: Annotated[
        How, "restore the clean activation in the corrupt run, or spoil the clean run"
    ] = "denoise",
    instead: Annotated[
        Instead, "what takes the cell's place: the other run's, its mean, nothing"
    ] = "resample",
    per: Annotated[
        Per | None, "k and v under grouped queries: the shared head, or one query head's view"
    ] = None,
    layers: Annotated[Layers, 'layers to patch, or "all"'] = "all",
    answer: AnswerOfPairs = None,
    wrong: WrongOfPairs = None,
    position: PositionSetting = -1,
) -> xr.DataArray:
    """Normalised effect [batch, layer, …] of replacing one cell, by the kind of cell.

    `what`: "head" (z of a head at all positions) and "q", "k", "v" and "pattern" of a head give [batch, layer, head];
    "head_position" [batch, layer, head, position]; "residual" (the stream entering the layer) and "mlp" (what the MLP
    adds) at one position [batch, layer, position]; "destination_source" (one attention weight)
    [batch, layer, head, query, key].
    `how="denoise"`: the corrupt run with the clean activation, `(m_patched - m_corrupt)/(m_clean - m_corrupt)`;
    "noise": the clean run with the corrupt one, `(m_patched - m_clean)/(m_corrupt - m_clean)`. With `instead` "zero" or
    "mean" (over the pairs of one length, at each position) the cell becomes that. Where the denominator is below 1e-6
    the effect is NaN, and the attribute `undefined` counts such pairs.
    k and v of grouped queries: `per="kv_head"` replaces the head that a group shares ([batch, layer, kv_head]),
    "query_head" what one query head sees of it; without `per` a model with grouped queries is refused.

    `measure`: "logit_difference" of `answer` and `wrong` at `position`, or a function logits [pair, position, vocab] →
    [pair], called with the pairs of one length in their order. The coordinates `clean` and `corrupt` [batch] are the
    measure of the prompts as they are. Edits that are on stay on, in every run.
    Unit: share of the way. Source: the formulas, checked against TransformerLens 4.3 and dense runs; papers from
    memory.
    """
    _check(what, how, instead)
    groups = pairs_of(model, clean, corrupt)
    if instead == "mean" and any(len(pairs.places) < 2 for pairs in groups):
        raise AnalysisError("instead='mean' needs two or more pairs of each length")
    cells = Cells.of(model, what, per)
    chosen = chosen_layers(layers, model.layers)
    count = sum(len(pairs.places) for pairs in groups)
    size = cells.shape(max(pairs.length for pairs in groups))
    found = torch.full((count, len(chosen), *size), torch.nan, dtype=torch.float64)
    ends = torch.zeros(2, count, dtype=torch.float64)
    for pairs in groups:
        moved = moved_of(model, pairs, measure, answer, wrong, position)
        ends[:, pairs.places] = torch.stack([moved.clean, moved.corrupt])
        window = tuple(slice(0, n) for n in cells.shape(pairs.length))
        found[(pairs.places, slice(None), *window)] = _swept(model, pairs, moved, cells, chosen, how, instead)
    undefined = int(found.flatten(1).isnan().all(1).sum())
    settings = measure_settings(measure, answer, wrong, position)
    return xr.DataArray(
        found.numpy(),
        dims=("batch", "layer", *cells.dims),
        coords={"batch": np.arange(count), "layer": chosen, "clean": ("batch", ends[0]), "corrupt": ("batch", ends[1])}
        | {dim: np.arange(n) for dim, n in zip(cells.dims, size, strict=True)},
        name="patch",
        attrs=ABOUT.attrs(
            provenance(model), what=what, how=how, instead=instead, per=per, undefined=undefined, **settings
        ),
    )  # fmt: skip


def _check(what: str, how: str, instead: str) -> None:
    for name, value, known in (
        ("what", what, What.__args__), ("how", how, How.__args__), ("instead", instead, Instead.__args__),
    ):  # fmt: skip
        if value not in known:
            raise AnalysisError(f"{name}={value!r} is unknown; give one of {', '.join(known)}")


def _swept(
    model: HookedModel,
    pairs: Pairs,
    moved: Moved,
    cells: Cells,
    layers: list[int],
    how: How,
    instead: Instead,
) -> Tensor:
    """Effects of the pairs of one length, [pair, layer, …]."""
    base, other = (pairs.corrupt, pairs.clean) if how == "denoise" else (pairs.clean, pairs.corrupt)
    source = cells.source(model, other.ids, layers, instead)
    run, idle = cells.indices(pairs, instead)
    plain = moved.corrupt if how == "denoise" else moved.clean
    out = torch.full(
        (len(layers), *cells.shape(pairs.length), len(pairs.places)), torch.nan, dtype=torch.float64
    )
    if idle:
        out[(slice(None), *torch.tensor(idle).T)] = moved.effect(plain, how)
    resuming = Resuming.of(model, base, lambda batch: _plainly(model, batch, moved))
    for place, layer in enumerate(tqdm(layers, desc="patching", unit="layer", disable=None)):
        for some in _together(run, base.ids.numel()):
            swap = cells.swap(model, layer, some, source[layer])
            with resuming.before(layer, len(some)):
                logits = swap.logits(base.ids.repeat(len(some), 1), moved.position)
            out[(place, *torch.tensor(some).T)] = moved.effect(moved.of(logits, len(some)), how)
    return out.movedim(-1, 0)


def _plainly(model: HookedModel, batch: Batch, moved: Moved) -> Tensor:
    """The measure of a batch as it is, in a run like those that are patched."""
    return moved.of(Swap(model, len(batch.ids)).logits(batch.ids, moved.position), 1)[0]


def _together(cells: list[tuple[int, ...]], tokens: int) -> list[list[tuple[int, ...]]]:
    fit = fitting(tokens)
    return [cells[i : i + fit] for i in range(0, len(cells), fit)]
