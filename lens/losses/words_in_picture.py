"""Losses over the maps of words in a picture: words apart (A-STAR), words kept, words seen (Attend-and-Excite)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from operator import index

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import conv2d, pad

from headwater.lens.errors import AnalysisError
from headwater.lens.records.record import Record

Groups = Sequence[Sequence[int]]  # the positions of the words of each group


def picture_maps(
    record: Record, layers: Sequence[int] | None = None
) -> Float[Tensor, "batch row column word"]:
    """The weights from patches to words of a record, mean over layers and heads, [batch, row, column, word].

    `record` is one of a diffusion model's parts: `record.part("cross")`, or "joint", where the words are the keys that
    are no patches. `layers` are all by default. With `grad=True` the maps carry gradients. AnalysisError where the
    queries are not the patches of one picture, of one place in every example, or where no key is a word.
    """
    grids = {each for row in record.grids for each in row}
    if len(grids) != 1 or any(len(row) != 1 for row in record.grids):
        raise AnalysisError(
            "the queries of the record are not the patches of one picture; take record.part('cross')"
        )
    (grid,) = grids
    keys = record.key_axis
    words = torch.ones(keys.tokens.shape[1], dtype=torch.bool)
    for each in {each for row in keys.grids for each in row}:
        words[each.tokens()] = False
    if not words.any() or grid.frames != 1:
        raise AnalysisError("no key of the record is a word; take record.part('cross')")
    chosen = record.layers if layers is None else list(layers)
    weights = torch.stack([record.pattern(layer) for layer in chosen]).mean((0, 2))
    return weights[:, grid.tokens()][..., words].unflatten(1, (grid.rows, grid.columns))


def positions_of(groups: Groups, words: int) -> list[list[int]]:
    """Groups of positions as lists, from the end where they are negative; AnalysisError where one is no position."""
    found = []
    for group in groups:
        try:
            found.append([index(word) for word in group])
        except TypeError:
            found.append([])
        if not found[-1] or not all(-words <= word < words for word in found[-1]):
            raise AnalysisError(f"a group lists positions of words below {words}; got {group!r:.60}")
    if not found:
        raise AnalysisError(
            "no group of words is given; list the positions of the words of each, such as [[1, 2]]"
        )
    return found


def group_maps(
    maps: Float[Tensor, "batch row column word"], groups: Groups
) -> Float[Tensor, "batch group row column"]:
    """The mean map of the words of each group."""
    groups = positions_of(groups, maps.shape[-1])
    return torch.stack([maps[..., list(group)].mean(-1) for group in groups], 1)


def _shared(one: Tensor, other: Tensor) -> Tensor:
    """Σ min / Σ (one + other) over the picture: 0 where they are apart, ½ where they are the same."""
    both = (one + other).sum((-2, -1))
    # words that no patch looks at share nothing
    return torch.minimum(one, other).sum((-2, -1)) / torch.where(both > 0, both, 1.0)


def overlap_loss(maps: Float[Tensor, "batch row column word"], groups: Groups) -> Float[Tensor, " batch"]:
    """A-STAR's segregation loss (Agarwal et al. 2023, arXiv 2306.14544): the room that words share.

    Σ over pairs m < n of Σ_ij min(A^m, A^n) / Σ_ij (A^m + A^n): 0 (apart) to ½ (the same) a pair. A^m is the mean map
    of a group's words. From the text; no code of the authors is public.

    >>> import headwater as hw, torch
    >>> maps = torch.tensor([[[[1.0, 0.0], [0.5, 0.5]]]])  # one row of two patches, two words
    >>> hw.losses.overlap_loss(maps, [[0], [1]])
    tensor([0.2500])
    """
    if len(groups) < 2:
        raise AnalysisError(f"overlap is between groups of words; got {len(groups)}")
    parts = group_maps(maps, groups).unbind(1)
    return torch.stack([_shared(one, other) for one, other in combinations(parts, 2)]).sum(0)


def kept_regions(
    maps: Float[Tensor, "batch row column word"], groups: Groups
) -> Bool[Tensor, "batch group row column"]:
    """Where each group of words stands at a step: patches above the middle of its smallest and largest weight.

    These are the masks of `retention_loss`. The paper makes them binary without saying at which height: this is ours.
    """
    found = group_maps(maps, groups).detach()
    return found > (found.amin((-2, -1), keepdim=True) + found.amax((-2, -1), keepdim=True)) / 2


def retention_loss(
    maps: Float[Tensor, "batch row column word"], groups: Groups, kept: Bool[Tensor, "batch group row column"]
) -> Float[Tensor, " batch"]:
    """A-STAR's retention loss: how far groups of words left the places where they stood at the step before.

    Σ over groups of 1 − Σ_ij min(A^m, B^m) / Σ_ij (A^m + B^m), where B^m are the masks `kept`. From the text.
    """
    found = group_maps(maps, groups)
    if kept.shape != found.shape:
        raise AnalysisError(
            f"kept is bool [batch, group, row, column] = {list(found.shape)}; got {list(kept.shape)}"
        )
    return (1 - _shared(found, kept.to(found))).sum(1)


def sharpened(
    maps: Float[Tensor, "batch row column word"], words: Sequence[int], text: slice, smooth: bool
) -> Float[Tensor, "batch group row column"]:
    """softmax over the words of `text` of 100 · A, of each word, smoothed by a Gaussian of 3 × 3 patches."""
    positions = range(maps.shape[-1])[text]
    (words,) = positions_of([words], maps.shape[-1])
    if missing := [word for word in words if word % maps.shape[-1] not in positions]:
        raise AnalysisError(
            f"word {missing[0]} is not in text={text}; widen it, as for prompts without an end token"
        )
    shares = (100 * maps[..., text]).softmax(-1)
    found = torch.stack([shares[..., positions.index(word % maps.shape[-1])] for word in words], 1)
    if not smooth:
        return found
    # the kernel of diffusers' and the authors' code, whose exponent is ((x - mean) / (2 · std))², std ½
    line = torch.exp(-(torch.arange(-1.0, 2.0).to(maps) ** 2))
    kernel = torch.outer(line, line) / line.sum() ** 2
    flat = pad(found.flatten(0, 1)[:, None], (1, 1, 1, 1), mode="reflect")
    return conv2d(flat, kernel[None, None])[:, 0].unflatten(0, found.shape[:2])


def excite_loss(
    maps: Float[Tensor, "batch row column word"],
    words: Sequence[int],
    *,
    text: slice = slice(1, -1),
    smooth: bool = True,
) -> Float[Tensor, " batch"]:
    """Attend-and-Excite (Chefer et al. 2023, arXiv 2301.13826): 1 − the largest weight of the word seen least.

    Weights are sharpened by a softmax of 100 · A over the words of `text` (by default without the first and the last,
    the tokens of start and end) and smoothed by 3 × 3 patches. Held to diffusers' pipeline.
    """
    most = sharpened(maps, words, text, smooth).amax((-2, -1))
    return (1 - most).clamp_min(0).amax(1)
