"""Recipes that bind words of a text-to-image model to regions of its picture: bounded attention."""

from __future__ import annotations

from collections.abc import Sequence
from operator import index

import torch
from jaxtyping import Bool
from torch import Tensor

from headwater.lens.edits.at_steps import AtSteps
from headwater.lens.edits.base import Edit
from headwater.lens.edits.pair_masks import MaskPairs
from headwater.lens.errors import EditError
from headwater.lens.running.denoising import CONDITIONAL


def bounded_attention(
    regions: Bool[Tensor, "region row column"], words: Sequence[Sequence[int]], *, background: bool = True,
    steps: str | int | slice | Sequence[int] = "all",
) -> dict[str, list[Edit]]:  # fmt: skip
    """Bounded Attention's masks (Dahary et al. 2024, arXiv 2403.16990): edits of the parts "cross" and "self".

    The words of subject i (`words[i]`, positions of tokens) are seen from the patches of `regions[i]` alone, and with
    `background` from the patches of no region too. A patch of a region sees, of the patches in regions, those of its
    own; patches of no region see all and are seen by all. Only the conditional branch is masked, at `steps`, as
    `AtSteps` takes them. The authors leave the background out once the guided steps are over, hide the end token from
    it, and draw regions anew from clusters of self-attention after some steps; these stay as they were given. Checked
    against their code.

    >>> import headwater as hw, torch
    >>> left = torch.arange(8) < 4
    >>> regions = torch.stack([left, ~left])[:, None].expand(2, 4, 8)
    >>> edits = hw.recipes.bounded_attention(regions, [[1, 2], [4, 5]])
    >>> sorted(edits)
    ['cross', 'self']
    """
    try:
        regions = torch.as_tensor(regions)
        words = [[index(word) for word in group] for group in words]
    except (TypeError, ValueError):
        raise EditError(
            "regions are bool [region, row, column], and words a list of positions of each, such as [[1, 2], [4]]; "
            f"got words {words!r:.60}"
        ) from None
    if (
        regions.dtype != torch.bool
        or regions.dim() != 3
        or not len(regions)
        or not regions.flatten(1).any(1).all()
    ):
        raise EditError(
            f"regions are bool [region, row, column], each with a patch or more; got {list(regions.shape)}"
        )
    if len(words) != len(regions) or not all(len(group) and min(group) >= 0 for group in words):
        raise EditError(
            f"{len(regions)} regions need as many groups of positions of words; got {list(words)!r:.60}"
        )
    inside = regions.flatten(1)
    outside = ~inside.any(0)
    to_words = torch.ones(inside.shape[1], max(max(group) for group in words) + 1, dtype=torch.bool)
    for group in words:
        to_words[:, list(group)] = False
    for group, region in zip(words, inside, strict=True):
        to_words[:, list(group)] |= (region | (outside & background))[:, None]
    own = (inside[:, :, None] & inside[:, None]).any(0)
    to_patches = own | outside[:, None] | outside
    masks = {"cross": to_words, "self": to_patches}
    return {part: [AtSteps(MaskPairs(mask), steps=steps, branch=CONDITIONAL)] for part, mask in masks.items()}
