"""Losses that hold words to regions of a picture: Bounded Attention, Attention Refocusing."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from headwater.lens.errors import AnalysisError
from headwater.lens.losses.words_in_picture import positions_of, sharpened

Regions = Bool[Tensor, "region row column"]


def _flat(regions: Tensor, patches: int) -> Tensor:
    regions = torch.as_tensor(regions)
    if regions.dtype != torch.bool or regions.dim() != 3 or not len(regions) or regions[0].numel() != patches:
        raise AnalysisError(
            f"regions are bool [region, row, column] over {patches} patches; got {regions.dtype} {list(regions.shape)}"
        )
    if not regions.flatten(1).any(1).all():
        raise AnalysisError("a region holds no patch")
    return regions.flatten(1)


def bounded_loss(
    weights: Float[Tensor, "layer batch head query key"],
    regions: Regions,
    words: Sequence[Sequence[int]] | None = None,
) -> Float[Tensor, " batch"]:
    """Bounded Attention's guidance loss (Dahary et al. 2024, arXiv 2403.16990): Σ over subjects of (1 − IoU)².

    IoU_i = F_i / (F_i + S · B_i). F_i is the attention from the patches of region i to the words of subject i
    (`words[i]`), summed over heads and meaned over layers, B_i that from the patches outside of all regions, S the
    number of subjects. Without `words` the weights are those of self-attention, and the keys of subject i are the
    patches of its region. The authors add 1.5 times the loss of cross-attention and 0.5 times that of self-attention.
    Checked against their code, which adds the end token to every subject's words: list it in `words` to do so.
    """
    if weights.dim() != 5:
        raise AnalysisError(f"weights are [layer, batch, head, query, key]; got {list(weights.shape)}")
    inside = _flat(regions, weights.shape[3]).to(weights.device)
    if words is not None and len(words) != len(inside):
        raise AnalysisError(f"{len(inside)} regions need as many groups of words; got {len(words)}")
    if words is not None:
        words = positions_of(words, weights.shape[-1])
    elif weights.shape[-1] != weights.shape[-2]:
        raise AnalysisError(
            f"weights of {weights.shape[-2]} patches on {weights.shape[-1]} keys are no self-attention; give words="
        )
    outside = ~inside.any(0)
    losses = []
    for number, region in enumerate(inside):
        columns = region if words is None else words[number]
        by_patch = weights[..., columns].sum((2, 4)).mean(0)  # [batch, patch]
        front, back = by_patch[:, region].sum(1), by_patch[:, outside].sum(1)
        every = front + len(inside) * back
        losses.append(
            (1 - front / torch.where(every > 0, every, 1.0)) ** 2
        )  # 1 for words that no patch looks at
    return torch.stack(losses).sum(0)


def refocus_cross_loss(
    maps: Float[Tensor, "batch row column word"], words: Sequence[Sequence[int]], regions: Regions, *,
    early: bool = True, text: slice = slice(1, -1), smooth: bool = True,
) -> Float[Tensor, " batch"]:  # fmt: skip
    """Attention Refocusing's loss of cross-attention, CAR (Phung, Ge & Huang 2023, arXiv 2306.05427).

    Of every word of subject i, with its largest sharpened weight (`excite_loss`) in region i, in the regions of each
    other subject (without region i) and outside of all: c · (1 − inside) + d · other + outside / 2, summed and divided
    by the number of subjects. c is 6 below 0.1, else 1; d is 4 above 0.15, else 1. Unless `early`, c is 0 from 0.2 on
    and d is 0 up to 0.1. Checked against the authors' code, which is early for 15 of its steps.
    """
    regions = torch.as_tensor(regions)
    _flat(regions, maps.shape[1] * maps.shape[2])
    words = positions_of(words, maps.shape[-1])
    if len(words) != len(regions):
        raise AnalysisError(f"{len(regions)} regions need as many groups of words; got {len(words)}")
    regions = regions.to(maps.device)
    total = maps.new_zeros(len(maps))
    nowhere = ~regions.any(0)
    for number, (group, region) in enumerate(zip(words, regions, strict=True)):
        for seen in sharpened(maps, group, text, smooth).unbind(1):
            inside = seen[:, region].amax(1)
            near = torch.where(inside < 0.1, 6.0, torch.where((inside < 0.2) | early, 1.0, 0.0))
            total = total + near * (1 - inside)
            for place, other in enumerate(regions):
                if place == number or not (other & ~region).any():
                    continue
                most = seen[:, other & ~region].amax(1)
                far = torch.where(most > 0.15, 4.0, torch.where((most > 0.1) | early, 1.0, 0.0))
                total = total + far * most
            if nowhere.any():
                total = total + seen[:, nowhere].amax(1) / 2
    return total / len(regions)


def refocus_self_loss(
    weights: Float[Tensor, "batch head query key"], regions: Regions
) -> Float[Tensor, " batch"]:
    """Attention Refocusing's loss of self-attention, SAR: the attention that leaves the region of its queries.

    Mean over the patches of the region of their weights outside of it, mean over heads and regions. Checked against the
    authors' code, where heads and layers are meaned too.
    """
    inside = _flat(regions, weights.shape[-1]).to(weights.device)
    leaving = [weights[:, :, region][..., ~region].sum(-1).mean((1, 2)) for region in inside]
    return torch.stack(leaving).mean(0)
