"""Head contrast: which heads give something else when a group of tokens is there and when it is not.

The vision-aware head divergence of He et al. 2025 in its general form: any group of tokens (an image, a hint, the first
token) that is left out, replaced or hidden, or a second prompt of the user's. Says where the difference arrives, not
that it matters for the answer.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import numpy as np
import torch
import xarray as xr
from torch import Tensor
from tqdm import tqdm

from headwater.analyses._catalogue.analysis import analysis
from headwater.analyses._catalogue.settings import Bounds
from headwater.analyses._measures.blanks import blank_id
from headwater.analyses._prompts.positions import Positions, columns_of
from headwater.lens.edits import Knockout
from headwater.lens.errors import AnalysisError
from headwater.lens.model import HookedModel


@analysis
def head_contrast(
    model: HookedModel,
    examples: Any,
    group: Annotated[Positions, "positions of the tokens that are taken away, counted in each text"] = (0,),
    how: Annotated[
        Literal["remove", "blank", "hide"],
        "leave them out, put a blank there, or hide them from every other token",
    ] = "remove",
    without: Any = None,
    position: Annotated[
        int, "token whose heads are compared, counted from the end, as runs differ in length", Bounds(high=-1)
    ] = -1,
    strongest: Annotated[int, "heads of each layer in the score of a text", Bounds(1)] = 1,
    blank: Annotated[str | None, "token put in the place; none: [MASK] or unknown"] = None,
) -> xr.Dataset:
    """`D[l, h] = ‖z_lh(text) - z_lh(text without the group)‖₂`, z the head's output at `position` before `W_O`.

    `examples` are texts or token ids, or a list of mappings of what the model takes (`{"given": ids, "pixel_values":
    …}`); with `without`, the same number of the other kind, these are the second runs and `group` is not used. Dataset:
    `divergence` [batch, layer, head]; `outlier`, where `D > mean + deviation` over the layer's heads and
    `‖z(without)‖² > mean + deviation` too; `score`, D with 0 at outliers; `selected`, the heads above the median score
    of their layer; `token_score` [batch] `= Σ_l` of the `strongest` largest scores of each layer, which the authors
    find lower for hallucinated words; and, over texts, `mean_score` [layer, head] and `selected_in` (share of texts).
    Deviations are those of a population. Unit: as the head's output. Source: the paper's text, checked; groups other
    than an image, and `blank` and `hide`, ours.

    Question: Which heads give something else when a group of tokens is taken away?
    Unit: length of the change of the head's output before the output projection.
    Source: He et al. 2025 (vision-aware head divergence, VHD), for any group of tokens.
    Cost: two forward passes per example.
    Not for: what the difference does to the answer (scale the heads to see it); layers against each other, whose
    outputs differ in size.
    """
    runs = _pairs(model, examples, without, group, how, blank)
    found = [
        _outputs(model, *run, position) for run in tqdm(runs, desc="head contrast", unit="text", disable=None)
    ]
    present, absent = (torch.stack(side) for side in zip(*found, strict=True))  # [text, layer, head, d]
    divergence = (present - absent).norm(dim=-1)
    outlier = _far(divergence) & _far(absent.square().sum(-1))
    score = divergence.masked_fill(outlier, 0)
    selected = score > _median(score)
    top = score.topk(min(strongest, model.n_heads), dim=-1).values
    dims = ("batch", "layer", "head")
    result = xr.Dataset(
        {
            "divergence": (dims, divergence.numpy()),
            "outlier": (dims, outlier.numpy()),
            "score": (dims, score.numpy()),
            "selected": (dims, selected.numpy()),
            "token_score": ("batch", top.sum((1, 2)).numpy()),
            "mean_score": (("layer", "head"), score.mean(0).numpy()),
            "selected_in": (("layer", "head"), selected.double().mean(0).numpy()),
        },
        coords={"batch": np.arange(len(runs)), "layer": model.layers, "head": np.arange(model.n_heads)},
    )
    settings = {"how": "given" if without is not None else how, "group": "" if without is not None else group}
    return result.assign_attrs(settings)


# the arguments of the two runs of a text, and the keys hidden in the second
Run = tuple[dict[str, Any], dict[str, Any], list[int]]


def _pairs(
    model: HookedModel, examples: Any, without: Any, group: Positions, how: str, blank: str | None
) -> list[Run]:
    rows = _rows(model, examples)
    if without is not None:
        others = _rows(model, without)
        if len(others) != len(rows):
            raise AnalysisError(
                f"without holds {len(others)} texts for {len(rows)} examples; give one for each"
            )
        return [(row, other, []) for row, other in zip(rows, others, strict=True)]
    stand_in = blank_id(model, blank) if how == "blank" else 0
    runs: list[Run] = []
    for place, row in enumerate(rows):
        ids = row.get("given")
        if not isinstance(ids, Tensor) or ids.is_floating_point():
            raise AnalysisError(
                "group names tokens of texts; for other inputs give the second runs as without="
            )
        gone = torch.zeros(ids.shape[1], dtype=torch.bool)
        gone[columns_of(group, torch.ones_like(ids, dtype=torch.bool), "group")[0]] = True
        if gone.all():
            raise AnalysisError(f"group is all of example {place}; leave at least its last token")
        if how == "hide":
            runs.append((row, row, gone.nonzero()[:, 0].tolist()))
            continue
        left = ids[:, ~gone] if how == "remove" else ids.masked_fill(gone, stand_in)
        runs.append((row, {**row, "given": left}, []))
    return runs


def _rows(model: HookedModel, examples: Any) -> list[dict[str, Any]]:
    """One mapping of arguments per text; token ids [1, position] without padding."""
    if isinstance(examples, dict):
        return [examples]
    if isinstance(examples, list | tuple) and examples and isinstance(examples[0], dict):
        return list(examples)
    if not isinstance(examples, str) and len(examples) == 0:
        raise AnalysisError("examples is empty; give at least one text or row of tokens")
    tokens = model.to_tokens(examples)
    return [{"given": ids[mask][None]} for ids, mask in zip(tokens.ids, tokens.mask, strict=True)]


def _outputs(
    model: HookedModel, first: dict[str, Any], second: dict[str, Any], hidden: list[int], position: int
) -> tuple[Tensor, Tensor]:
    """z at the position in both runs, [layer, head, d] in float64."""
    present = _read(model, first, position)
    if not hidden:
        return present, _read(model, second, position)
    length = second["given"].shape[1]
    others = [i for i in range(length) if i not in set(hidden)]
    with model.edit(Knockout(others, hidden, "all")):
        return present, _read(model, second, position)


def _read(model: HookedModel, given: dict[str, Any], position: int) -> Tensor:
    z = model.head_outputs(**given)
    if -position > z.shape[3]:
        raise AnalysisError(
            f"position={position}, but a run has {z.shape[3]} tokens; give one that every run has"
        )
    return z[0, :, :, position].double().cpu()


def _far(values: Tensor) -> Tensor:
    """More than a deviation above the mean of the layer."""
    return values > values.mean(-1, keepdim=True) + values.std(-1, keepdim=True, correction=0)


def _median(values: Tensor) -> Tensor:
    return values.quantile(0.5, dim=-1, keepdim=True)
