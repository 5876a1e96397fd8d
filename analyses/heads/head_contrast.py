"""Head contrast: how much the output of each head changes when a group of tokens is taken away.

The vision-aware head divergence of He et al. 2025, for any group of tokens (an image, a hint, the first token) that is
removed, replaced or hidden, or that a second prompt lacks. It shows which heads react, not whether the answer changes.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from headwater.analyses._catalogue.analysis import analysis
from headwater.analyses._catalogue.settings import Bounds
from headwater.analyses._measures.blanks import blank_id
from headwater.analyses._prompts.examples import Batch, keys_of, singles_of, without_tokens
from headwater.analyses._prompts.positions import Positions, columns_of
from headwater.lens.edits import Knockout
from headwater.lens.errors import AnalysisError
from headwater.lens.model import HookedModel
from headwater.lens.models.signature import markers
from headwater.lens.naming.texts import is_text
from headwater.lens.naming.tokens import Tokens
from headwater.lens.progress import progress
from headwater.lens.recipes.vhr import above_median, head_divergence


@analysis
def head_contrast(
    model: HookedModel,
    examples: Any,
    group: Annotated[Positions, "positions of the tokens that are taken away, counted in each text"] = (0,),
    how: Annotated[Literal["remove", "blank", "hide"], "leave out, replace by a blank, or hide"] = "remove",
    without: Any = None,
    position: Annotated[int, "token that is compared, counted from the end", Bounds(high=-1)] = -1,
    strongest: Annotated[int, "heads of each layer in the score of a text", Bounds(1)] = 1,
    blank: Annotated[str | None, "token put in the place; none: [MASK] or unknown"] = None,
) -> xr.Dataset:
    """`D[l, h] = ‖z_lh(text) - z_lh(text without the group)‖₂`, z the head's output at `position` before `W_O`.

    "hide" hides the group from every other token: also patches of a picture, and the encoder's tokens in
    cross-attention (`model.part("cross")`), where `position` is the decoder's. `position` counts from the end, as the
    runs may differ in length. `examples` are texts or token ids, or a list of mappings of model inputs (`{"given": ids,
    "pixel_values": …}`). If `without` is given, it holds the second input of each example, and `group` is not used.
    Dataset: `divergence` [batch, layer, head], which is D; `outlier`, true where both D and `‖z(without)‖²` exceed the
    mean of the layer's heads by more than their (population) standard deviation; `score`, D with 0 at outliers;
    `selected`, the heads above the median score of their layer; `token_score` [batch], the sum over layers of the
    `strongest` largest scores, lower for hallucinated words in the paper. Over texts: `mean_score` [layer, head] and
    `selected_in`, the share of texts.

    Question: Which heads give something else when a group of tokens is taken away?
    Unit: length of the change of the head's output before the output projection.
    Source: He et al. 2025 (vision-aware head divergence, VHD), held to its text; "blank", "hide" and groups other than
    an image are ours.
    Cost: two forward passes per example.
    Not for: what the difference does to the answer (scale the heads to see it); comparing layers, whose outputs differ
    in size.

    >>> import headwater as hw
    >>> model = hw.load("tasks-4l")
    >>> text = "When Mary and John went to the store , John gave a drink to"
    >>> found = hw.analyses.head_contrast(model, text, group=[10], how="hide")  # the second "John"
    >>> found.divergence.shape, bool((found.divergence.sel(layer=0) < found.divergence.max()).all())
    ((1, 4, 8), True)
    """
    runs = _pairs(model, examples, without, group, how, blank)
    found = []
    for first, second, edits in progress(runs, desc="head contrast", unit="text"):
        plain = _read(model, first, position)
        with model.edit(*edits):
            found.append((plain, _read(model, second, position)))
    present, absent = (torch.stack(side) for side in zip(*found, strict=True))  # [text, layer, head, d]
    divergence, outlier = head_divergence(present, absent)
    score = divergence.masked_fill(outlier, 0)
    selected = above_median(score)
    top = score.topk(min(strongest, model.n_heads), dim=-1).values
    dims = ("batch", "layer", "head")
    given = without is not None
    return xr.Dataset(
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
        attrs={"how": "given" if given else how, "group": "" if given else group},
    )


# the arguments of the two runs of a text, and the edits of the second
Run = tuple[dict[str, Any], dict[str, Any], list[Knockout]]


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
        if not isinstance(ids, Tensor) or (ids.is_floating_point() and not isinstance(ids, Tokens)):
            raise AnalysisError(
                "group names tokens of texts; for other inputs give the second runs as without="
            )
        seen = keys_of(model, ids)
        gone = torch.zeros(seen.shape[1], dtype=torch.bool)
        gone[columns_of(group, seen.mask.cpu(), "group")[0]] = True
        if how != "hide":
            _refuse_no_words(model, ids, gone, how)
        if gone.all():
            raise AnalysisError(f"group is all of example {place}; leave at least its last token")
        if how == "hide":
            hidden = gone.nonzero()[:, 0].tolist()
            crosses = model.parts[model.part_name].crosses
            others = "all" if crosses else (~gone).nonzero()[:, 0].tolist()
            runs.append((row, row, [Knockout(others, hidden, "all")]))
            continue
        left = without_tokens(ids, gone) if how == "remove" else _blanked(ids, gone, stand_in)
        runs.append((row, {**row, "given": left}, []))
    return runs


def _refuse_no_words(model: HookedModel, ids: Tensor, gone: Tensor, how: str) -> None:
    """AnalysisError where the tokens that go are no words of the text, which can be left out or replaced."""
    part = model.parts[model.part_name]
    words = part.keys in ("text", "decoder") and not part.crosses
    places = torch.tensor(list(markers(model.hf).values()), dtype=ids.dtype)
    if not words or torch.isin(ids.as_subclass(Tensor)[0, gone].cpu(), places).any():
        raise AnalysisError(
            f"how={how!r} is for words, and these tokens are of {part.keys if not words else 'a picture'}; give "
            "how='hide', or the second runs as without="
        )


def _blanked(ids: Tensor, gone: Tensor, stand_in: int) -> Tensor:
    return Batch(ids, [0]).rows(slice(None), ids.masked_fill(gone, stand_in))


def _rows(model: HookedModel, examples: Any) -> list[dict[str, Any]]:
    """The model inputs of each text, as mappings; token ids [1, position] without padding."""
    if isinstance(examples, dict):
        return [examples]
    if (
        isinstance(examples, list | tuple)
        and examples
        and isinstance(examples[0], dict)
        and not is_text(examples)
    ):
        return list(examples)
    return [{"given": row} for row in singles_of(model, examples)]


def _read(model: HookedModel, given: dict[str, Any], position: int) -> Tensor:
    """z at the position, [layer, head, d] in float64."""
    z = model.head_outputs(**given)
    if -position > z.shape[3]:
        raise AnalysisError(
            f"position={position}, but a run has {z.shape[3]} tokens; give one that every run has"
        )
    return z[0, :, :, position].double().cpu()
