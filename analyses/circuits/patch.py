"""Activation patching: which activations carry the difference between the answers to two prompts?

The standard method (Wang et al. 2022, arXiv 2211.00593, for heads; Meng et al. 2022 for the residual stream); the
numbers agree with TransformerLens' `patching`. Many cells run in one batch as copies of the prompts. A run starts at
the patched layer and at the first position that changes, and computes only the logits that are read. Each cell is
patched alone, so interactions of cells do not show.
"""

from __future__ import annotations

from functools import partial
from typing import Annotated

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from headwater.analyses._catalogue.analysis import analysis
from headwater.analyses._measures.measure import PositionSetting
from headwater.analyses._measures.pair_scores import AnswerOfPairs, Asked, How, PairMeasure, WrongOfPairs
from headwater.analyses._prompts.examples import Examples
from headwater.analyses._prompts.pairs import PairExamples, Pairs
from headwater.analyses._prompts.positions import Positions
from headwater.analyses._runs.prompt_copies import Copies
from headwater.analyses._runs.replace_activations import Per
from headwater.analyses.circuits._patch_cells import Cells, Index, What, groups_of
from headwater.analyses.circuits._patch_estimates import estimated, refuse_what
from headwater.lens.attention.backward_rules import BackwardRule
from headwater.lens.edits.heads import Ablation
from headwater.lens.model import HookedModel
from headwater.lens.naming.heads import chosen_layers
from headwater.lens.progress import progress


@analysis
def patch(
    model: HookedModel,
    clean: Examples | PairExamples,
    corrupt: Examples | None = None,
    measure: PairMeasure = "logit_difference",
    what: Annotated[What, "what a cell is"] = "head",
    how: Annotated[
        How, "restore the clean activation in the corrupt run, or spoil the clean run"
    ] = "denoise",
    ablation: Annotated[
        Ablation, "what takes the cell's place: the other run's, its mean, nothing"
    ] = "resample",
    per: Annotated[
        Per | None, "k and v under grouped queries: the shared head, or one query head's view"
    ] = None,
    layers: Annotated[Positions, 'layers to patch, or "all"'] = "all",
    answer: AnswerOfPairs = None,
    wrong: WrongOfPairs = None,
    position: PositionSetting = -1,
    estimate: Annotated[
        BackwardRule | None,
        "one backward pass by this rule in the place of a run per cell; none: run every cell",
    ] = None,
) -> xr.DataArray:
    """Normalised effect [batch, layer, …] of replacing one cell.

    `what`: "head" (z of a head at all positions, behind an output gate if there is one) and "q", "k", "v" and "pattern"
    of a head give [batch, layer, head];
    "head_position" [batch, layer, head, position]; "residual" (the stream entering the layer), "attention" and
    "mlp" (what each adds to the stream) at one position [batch, layer, position]; "destination_source" (one attention
    weight) [batch, layer, head, query, key].

    `how="denoise"`: the corrupt run with the clean activation, `(m_patched - m_corrupt)/(m_clean - m_corrupt)`;
    "noise": the clean run with the corrupt one, `(m_patched - m_clean)/(m_corrupt - m_clean)`. `ablation` "zero" or
    "mean" (over the pairs of one length, at each position) replaces the cell by that instead. Where the denominator is
    below 1e-6 the effect is NaN; the attribute `undefined` counts such pairs.

    Layers and heads are of the model's part: `model.part("encoder")`, `model.part("cross")` (whose keys are the
    encoder's tokens), `model.part("vision")`. The prompts may be any examples, pictures too.

    k and v under grouped queries: `per="kv_head"` replaces the head that a group shares ([batch, layer, kv_head]),
    "query_head" the copy that one query head reads. Without `per` a model with grouped queries is refused.

    `estimate` is for heads, the stream, attention and MLPs: `Σ_d slope · (other - own)` of each cell, with the slope of
    the measure in the run that is patched, all cells from one backward pass. "gradient" is attribution patching. "relp"
    holds norms' scales and attention weights constant, takes f(x)/x for an activation's slope and hands each factor of
    a product half; "relp_released" does not hold the weights, as its authors' code by default. "gim" takes the
    softmax's slope at temperature 2, a quarter of it for queries and keys, and half for values and factors. "attnlrp"
    is "relp" with that quarter and half at temperature 1.

    `clean` and `corrupt` are prompts of equal length. With `corrupt=None`, `clean` holds pairs of them, or examples of
    a prompt set. `measure`: "logit_difference" of `answer` and `wrong` at `position` (default: the examples' tokens, or
    the model's predictions), or a function logits [pair, position, vocab] → [pair], called with the pairs of one length
    in their order. The coordinates `clean` and `corrupt` [batch] are the measure of the unpatched prompts. Active edits
    apply to every run.

    Question: Which activations carry what makes two prompts differ?
    Unit: share of the way from the patched run's measure (0) to the other prompt's (1).
    Source: Wang et al. 2022, arXiv:2211.00593; Meng et al. 2022, arXiv:2202.05262; compared with TransformerLens 4.3.
    Estimates: Nanda 2023; RelP, Rezaei Jafari et al. 2025, arXiv:2508.21258; GIM, Edin et al. 2025, arXiv:2505.17630;
    AttnLRP, Achtibat et al. 2024, arXiv:2402.05602, patented in part: the licence of its authors' code grants no patent
    rights. Held to the rules written out, not to the authors' code.
    Cost: per cell a run from its layer and position on, many at once; destination_source has heads·S² cells per layer.
    Estimates: three passes.
    Not for: cells that stand in for each other; which path an effect takes (path_patch); prompts of unequal length. An
    estimate is no measurement: hold it to runs on the model at hand.

    >>> import headwater as hw
    >>> model = hw.load("tasks-4l")
    >>> clean = "When Mary and John went to the store , John gave a drink to"
    >>> corrupt = "When Mary and John went to the store , Mary gave a drink to"
    >>> effect = hw.analyses.patch(model, clean, corrupt, answer="Mary", wrong="John", what="residual")
    >>> effect.dims, effect.sel(layer=0).argmax("position").values.tolist()  # the prompts differ at position 10
    (('batch', 'layer', 'position'), [10])
    """
    asked = Asked(measure, answer, wrong, position)
    groups = groups_of(model, clean, corrupt, ablation)
    cells = Cells.of(model, what, per)
    if estimate is not None:
        refuse_what(cells)
    chosen = chosen_layers(layers, model.layers)
    count = sum(len(pairs.places) for pairs in groups)
    longest = [max(lengths) for lengths in zip(*(pairs.axes(model) for pairs in groups), strict=True)]
    size = cells.shape((longest[0], longest[1]))
    found = torch.full((count, len(chosen), *size), torch.nan, dtype=torch.float64)
    ends = torch.zeros(2, count, dtype=torch.float64)
    for pairs in groups:
        window = tuple(slice(0, n) for n in cells.shape(pairs.axes(model)))
        sweep = _swept if estimate is None else partial(estimated, rule=estimate)
        swept = sweep(model, pairs, asked, cells, chosen, how, ablation)
        ends[:, pairs.places], found[(pairs.places, slice(None), *window)] = swept
    undefined = int(found.flatten(1).isnan().all(1).sum())
    return xr.DataArray(
        found.numpy(),
        dims=("batch", "layer", *cells.dims),
        coords={"batch": np.arange(count), "layer": chosen, "clean": ("batch", ends[0]), "corrupt": ("batch", ends[1])}
        | {dim: np.arange(n) for dim, n in zip(cells.dims, size, strict=True)},
        name="patch",
        attrs={"undefined": undefined, **asked.settings},
    )  # fmt: skip


def _swept(
    model: HookedModel, pairs: Pairs, asked: Asked, cells: Cells, layers: list[int], how: How, ablation: Ablation
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The measures of both sides [2, pair], and effects [pair, layer, …], of the pairs of one length."""
    copies, seen = Copies.of(model, pairs, asked, how, **cells.kept(layers))
    told = copies.told
    axes = pairs.axes(model)
    run, idle = cells.indices(copies, axes, ablation)
    out = torch.full((len(layers), *cells.shape(axes), len(pairs.places)), torch.nan, dtype=torch.float64)
    if idle:
        out[(slice(None), *torch.tensor(idle).T)] = told.effect(told.unpatched(how), how)
    together = _together(cells, run, copies, ablation)
    for place, layer in enumerate(progress(layers, desc="patching", unit="layer")):
        source = cells.source(seen, layer, ablation)
        for start, some in together:
            swap = cells.swap(model, layer, some, source, copies.window(start))
            patched = copies.measure(swap, len(some), layer, start)
            out[(place, *torch.tensor(some).T)] = told.effect(patched, how)
    return told.ends, out.movedim(-1, 0)


def _together(
    cells: Cells, run: list[Index], copies: Copies, ablation: Ablation
) -> list[tuple[int, list[Index]]]:
    """Groups of cells that run in one batch, each with the position at which its run starts."""
    found, done = [], 0
    while done < len(run):
        start = cells.start(run[done], copies, ablation)
        found.append((start, run[done : done + copies.fitting(start)]))
        done += len(found[-1][1])
    return found
