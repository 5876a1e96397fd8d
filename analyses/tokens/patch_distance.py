"""Patch distance: how strongly each head of a vision model looks at patches k steps away on the grid.

After Li et al. 2023 (arXiv 2303.13731), whose formulas were not at hand. Steps are counted by the Chebyshev distance,
so equal distances form rings; rows and columns of the class token are kept apart. One walk over the rows of each layer.
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from headwater.analyses._catalogue.analysis import analysis
from headwater.lens.errors import AnalysisError
from headwater.lens.records.record import Record


@analysis(maps="square")
def patch_distance(
    record: Record,
    per_example: Annotated[bool, "keep one value per image instead of their mean"] = False,
) -> xr.Dataset:
    """`strength[l, h, k] = mean_i Σ_{j: hop(i, j) = k} A_ij` over patches i, hop the larger of row and column distance.

    Hop 0 is the patch itself. `per_patch` divides each ring by its number of patches first, since the border cuts
    rings. `mean_hops` is `mean_i Σ_j A_ij·hop(i, j) / Σ_j A_ij` over patches j. `to_prefix` is the weight of patches on
    the other tokens (class, register, detection), `from_prefix` the weight of each of these on all patches. All are
    [layer, head], the first two also [hop]; with `per_example` [batch, …]. `strength` over all hops and `to_prefix` add
    up to the mass of a row. AnalysisError for a record without a grid (`record.part("vision")` has one).

    Question: How far on the image does each head look?
    Unit: attention weight; mean_hops: patches.
    Source: after Li et al. 2023, arXiv:2303.13731 (k-hop strength; formulas from memory).
    Cost: one walk over the rows of each layer, memory O(S) per row block.
    Not for: records of text; comparing grids of different size; windowed maps, whose patches are not all seen.

    >>> import headwater as hw, torch, transformers
    >>> sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    >>> config = transformers.ViTConfig(image_size=32, patch_size=8, **sizes)
    >>> model = hw.load(transformers.ViTModel(config).eval())
    >>> found = hw.analyses.patch_distance(model.record(torch.zeros(1, 3, 32, 32)))
    >>> found.strength.dims, found.strength.shape  # hops 0 to 3 on a grid of 4 × 4 patches
    (('layer', 'head', 'hop'), (2, 2, 4))
    """
    about = record.provenance
    if "patch_grid" not in about or "prefix_tokens" not in about:
        others = ", ".join(
            f"record.part({name!r})" for name, r in record.parts.items() if "prefix_tokens" in r.provenance
        )
        raise AnalysisError(
            f"the record has no grid of patches; give one of images{others and ', here ' + others}"
        )
    (rows, columns), prefix = about["patch_grid"], int(about["prefix_tokens"])
    suffix = int(about.get("suffix_tokens", 0))
    places = torch.cartesian_prod(torch.arange(float(rows)), torch.arange(float(columns)))
    hops = torch.cdist(places, places, p=torch.inf).long()  # whole numbers, so exact
    layers = [_of_layer(record, layer, hops, prefix, suffix) for layer in record.layers]
    dims = ("batch", "layer", "head")
    found = {name: torch.stack([layer[name] for layer in layers], 1).numpy() for name in layers[0]}
    result = xr.Dataset(
        {name: ((*dims, "hop") if values.ndim == 4 else dims, values) for name, values in found.items()},
        coords={
            "layer": record.layers, "head": np.arange(record.n_heads), "hop": np.arange(int(hops.max()) + 1),
        },
    )  # fmt: skip
    return result.assign_coords(batch=np.arange(len(record.valid))) if per_example else result.mean("batch")


def _of_layer(record: Record, layer: int, hops: Tensor, prefix: int, suffix: int) -> dict[str, Tensor]:
    """The five numbers of one layer, [batch, head] or [batch, head, hop]."""
    map = record.map(layer)
    batch, heads, queries, _ = map.shape
    rings = torch.nn.functional.one_hot(hops).sum(1).double()  # patches in each ring of each patch
    strength = torch.zeros(batch, heads, rings.shape[1], dtype=torch.float64)
    per_patch, mean_hops = torch.zeros_like(strength), torch.zeros(batch, heads, dtype=torch.float64)
    to_prefix, from_prefix = torch.zeros_like(mean_hops), torch.zeros_like(mean_hops)
    end = queries - suffix
    for span, tile in map.row_blocks():
        weights, place = tile.double().cpu(), torch.arange(span.start, span.stop)
        looking = (place >= prefix) & (place < end)
        from_prefix += weights[:, :, ~looking, prefix:end].sum((2, 3))
        place, weights = place[looking] - prefix, weights[:, :, looking]
        own, seen = hops[place], weights[..., prefix:end]
        by_hop = seen.new_zeros(*seen.shape[:3], rings.shape[1])
        by_hop.scatter_add_(-1, own.expand_as(seen), seen)
        strength += by_hop.sum(2)
        per_patch += (
            (by_hop / rings[place]).nan_to_num().sum(2)
        )  # 0/0: a ring beyond the border has no patches
        mass = by_hop.sum(-1)
        steps = by_hop @ torch.arange(rings.shape[1], dtype=torch.float64)
        mean_hops += torch.where(mass > 0, steps / mass, 0.0).sum(2)
        to_prefix += weights[..., :prefix].sum((2, 3)) + weights[..., end:].sum((2, 3))
    patches, others = end - prefix, prefix + suffix
    reach = (rings > 0).sum(0)  # number of patches that have each ring
    return {
        "strength": strength / patches,
        "per_patch": per_patch / reach,
        "mean_hops": mean_hops / patches,
        "to_prefix": to_prefix / patches,
        "from_prefix": from_prefix / others if others else torch.full_like(from_prefix, torch.nan),
    }
