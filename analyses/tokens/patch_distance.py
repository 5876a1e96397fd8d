"""Patch distance: how strongly each head looks at patches k steps away on the grid of a picture or video.

After Li et al. 2023 (arXiv 2303.13731), whose formulas were not at hand. Steps are counted by the Chebyshev distance,
so equal distances form rings; rows and columns of tokens that are no patches are kept apart. One walk over the rows of
each layer.
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from headwater.analyses._catalogue.analysis import analysis
from headwater.analyses._catalogue.settings import Bounds
from headwater.lens.errors import AnalysisError
from headwater.lens.naming.grids import Grid
from headwater.lens.records.record import Record


@analysis(maps="square")
def patch_distance(
    record: Record,
    per_example: Annotated[bool, "keep one value per batch row instead of their mean"] = False,
    image: Annotated[int, "which picture of each row, counted from 0", Bounds(0)] = 0,
) -> xr.Dataset:
    """`strength[l, h, k] = mean_i Σ_{j: hop(i, j) = k} A_ij` over patches i, hop the larger of row and column distance.

    Hop 0 is the patch itself. `per_patch` divides each ring by its number of patches first, since the border cuts
    rings. `mean_hops` is `mean_i Σ_j A_ij·hop(i, j) / Σ_j A_ij` over patches j. `to_prefix` is the weight of patches on
    the other tokens (class, register, detection, those of a text or of other pictures), `from_prefix` the weight of
    each real one of these on all patches. All are [layer, head], the first two also [hop]; with `per_example`
    [batch, …]. `strength` over all hops and `to_prefix` add up to the mass of a row. In a video hops are steps on the
    picture, whatever the frame, and `mean_frames` is `mean_i Σ_j A_ij·|frame(i) - frame(j)| / Σ_j A_ij`.
    In a text with pictures the patches are the tokens of picture `image`; where these are squares of patches, so are
    the hops, and a causal map lets a patch see earlier ones alone. AnalysisError for a record without such a picture.

    Question: How far on the image does each head look?
    Unit: attention weight; mean_hops: patches; mean_frames: frames, as the tower joins them.
    Source: after Li et al. 2023, arXiv:2303.13731 (k-hop strength; formulas from memory).
    Cost: one walk over the rows of each layer, memory O(S) per row block.
    Not for: comparing grids of different size; windowed maps, whose patches are not all seen.

    >>> import headwater as hw, torch, transformers
    >>> sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    >>> config = transformers.ViTConfig(image_size=32, patch_size=8, **sizes)
    >>> model = hw.load(transformers.ViTModel(config).eval())
    >>> found = hw.analyses.patch_distance(model.record(torch.zeros(1, 3, 32, 32)))
    >>> found.strength.dims, found.strength.shape  # hops 0 to 3 on a grid of 4 × 4 patches
    (('layer', 'head', 'hop'), (2, 2, 4))
    """
    grids = _chosen(record, image)
    frame, row, column = grids[0].coordinates().double().T
    hops = torch.maximum(*((each[:, None] - each).abs() for each in (row, column))).long()
    apart = (frame[:, None] - frame).abs()
    layers = [
        _of_layer(record, layer, hops, apart, [grid.tokens() for grid in grids]) for layer in record.layers
    ]
    dims = ("batch", "layer", "head")
    found = {name: torch.stack([layer[name] for layer in layers], 1).numpy() for name in layers[0]}
    if grids[0].frames == 1:
        del found["mean_frames"]
    result = xr.Dataset(
        {name: ((*dims, "hop") if values.ndim == 4 else dims, values) for name, values in found.items()},
        coords={
            "layer": record.layers, "head": np.arange(record.n_heads), "hop": np.arange(int(hops.max()) + 1),
        },
    )  # fmt: skip
    return result.assign_coords(batch=np.arange(len(record.valid))) if per_example else result.mean("batch")


def _chosen(record: Record, image: int) -> list[Grid]:
    """The grid of the asked picture in each row; all have one shape."""
    if not any(record.grids):
        others = [f"record.part({name!r})" for name, part in record.parts.items() if any(part.grids)]
        here = f", here {', '.join(others)}" if others else ""
        raise AnalysisError(f"the record has no grid of patches; give one of images{here}")
    short = next((row for row, pictures in enumerate(record.grids) if len(pictures) <= image), None)
    if short is not None:
        raise AnalysisError(
            f"image={image}, but batch row {short} has {len(record.grids[short])} pictures; count from 0"
        )
    grids = [pictures[image] for pictures in record.grids]
    if len(shapes := {grid.shape for grid in grids}) > 1:
        raise AnalysisError(
            f"the pictures have grids of {' and '.join(map(str, sorted(shapes)))} (frames, rows, columns); record "
            "pictures of one size together"
        )
    return grids


def _of_layer(
    record: Record, layer: int, hops: Tensor, apart: Tensor, tokens: list[Tensor]
) -> dict[str, Tensor]:
    """The numbers of one layer, [batch, head] or [batch, head, hop]; `tokens` are the patches of each row."""
    map = record.map(layer)
    batch, heads, queries, _ = map.shape
    rings = torch.nn.functional.one_hot(hops).sum(1).double()  # patches in each ring of each patch
    strength = torch.zeros(batch, heads, rings.shape[1], dtype=torch.float64)
    per_patch, mean_hops = torch.zeros_like(strength), torch.zeros(batch, heads, dtype=torch.float64)
    to_prefix, from_prefix, mean_frames = (torch.zeros_like(mean_hops) for _ in range(3))
    numbers = torch.full((batch, queries), -1)  # of the patch that a token is
    for row, place in enumerate(tokens):
        numbers[row, place] = torch.arange(len(place))
    for span, tile in map.row_blocks():
        for b, place in enumerate(tokens):
            weights, own = tile[b].double().cpu(), numbers[b, span]
            looking = own >= 0
            seen = weights[:, :, place]
            from_prefix[b] += seen[:, ~looking].sum((1, 2))
            own, seen, weights = own[looking], seen[:, looking], weights[:, looking]
            by_hop = seen.new_zeros(*seen.shape[:2], rings.shape[1])
            by_hop.scatter_add_(-1, hops[own].expand_as(seen), seen)
            strength[b] += by_hop.sum(1)
            per_patch[b] += (
                (by_hop / rings[own]).nan_to_num().sum(1)
            )  # 0/0: a ring beyond the border has no patches
            mass = by_hop.sum(-1)
            steps = by_hop @ torch.arange(rings.shape[1], dtype=torch.float64)
            mean_hops[b] += torch.where(mass > 0, steps / mass, 0.0).sum(1)
            mean_frames[b] += torch.where(mass > 0, (seen * apart[own]).sum(-1) / mass, 0.0).sum(1)
            to_prefix[b] += (weights.sum(-1) - mass).sum(1)
    patches = len(hops)
    others = (record.valid.sum(1) - patches).double()[:, None]
    reach = (rings > 0).sum(0)  # number of patches that have each ring
    return {
        "strength": strength / patches,
        "per_patch": per_patch / reach,
        "mean_hops": mean_hops / patches,
        "mean_frames": mean_frames / patches,
        "to_prefix": to_prefix / patches,
        "from_prefix": torch.where(others > 0, from_prefix / others, torch.nan),
    }
