"""Circuit rank: how many directions the QK and OV circuits of a head use.

A circuit is the product of two thin matrices (Elhage et al. 2021). Its singular values come from a d_head × d_head
matrix, so the d_model × d_model product is never made. Only the weights count, not the inputs.
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn

from headwater.analyses._catalogue.analysis import analysis
from headwater.analyses._catalogue.settings import Bounds
from headwater.lens.errors import ModelError
from headwater.lens.model import HookedModel
from headwater.lens.models.weights import layer_weights, mean_is_lost, triangle

CIRCUITS = ("qk", "ov")
# query, key, value [head, d_model, d_head] and output [head, d_head, d_model]
Sides = tuple[Tensor, Tensor, Tensor, Tensor]


@analysis
def circuit_rank(
    model: HookedModel,
    tolerance: Annotated[float, "share of the largest singular value that counts as 0", Bounds(0, 1)] = 1e-5,
) -> xr.Dataset:
    """Ranks of `W_QK = W_Q W_Kᵀ` and `W_OV = W_V W_O` of each query head, with the gain of the norm before attention.

    The mean over d_model is left out where LayerNorm takes it out.
    Dataset, all [circuit, layer, head]: `rank`, the number of singular values above `tolerance` times the largest;
    `stable_rank = ‖W‖_F² / ‖W‖₂²`; the norms `frobenius` and `spectral`. `singular_values` [circuit, layer, head,
    direction] begin with the largest. A zero circuit has rank 0 and stable rank NaN. Biases, soft caps and rotary
    positions are left out: W_QK is that of distance 0. ModelError names a model whose weights have no known layout.

    Question: How many directions do the QK and OV circuits of each head use?
    Unit: directions; norms in units of the weights.
    Source: Elhage et al. 2021 (the circuits); stable rank: Rudelson & Vershynin 2007; definitions from memory.
    Cost: two QR decompositions and one d_head × d_head singular value problem per head and circuit.
    Not for: what a head does on real inputs; comparing QK of rotary models, whose circuit turns with distance.

    >>> import headwater as hw
    >>> model = hw.load("tasks-4l")
    >>> found = hw.analyses.circuit_rank(model)
    >>> dict(found["rank"].sizes)
    {'circuit': 2, 'layer': 4, 'head': 8}
    >>> int(found["rank"].sel(circuit="ov", layer=0, head=0)) == model.d_head  # full rank
    True
    """
    by_layer = []
    for layer in model.layers:
        query, key, value, output = sides(model, layer)
        products = [triangle(a) @ triangle(b).mT for a, b in ((query, key), (value, output.mT))]
        by_layer.append(torch.linalg.svdvals(torch.stack(products)))
    most = max(found.shape[-1] for found in by_layer)  # heads of other layers may be wider
    values = torch.stack(
        [nn.functional.pad(v, (0, most - v.shape[-1]), value=torch.nan) for v in by_layer], 1
    ).cpu()
    spectral, frobenius = values[..., 0], values.square().nansum(-1).sqrt()
    found = {
        "rank": (values > tolerance * spectral[..., None]).sum(-1),
        "stable_rank": (frobenius / spectral).square(),  # 0 / 0 is NaN
        "frobenius": frobenius,
        "spectral": spectral,
    }
    dims = ("circuit", "layer", "head")
    return xr.Dataset(
        {name: (dims, numbers.numpy()) for name, numbers in found.items()},
        coords={"circuit": list(CIRCUITS), "layer": model.layers, "head": np.arange(model.n_heads)},
    ).assign(singular_values=((*dims, "direction"), values.numpy()))


def sides(model: HookedModel, layer: int) -> Sides:
    """What the heads of a layer read and write, in float64; the gain of the norm before attention is folded in.

    A LayerNorm takes the mean of the stream out, so what reads that mean is taken out of the weights too; where every
    reader is behind a LayerNorm, what writes it is taken out as well: no later part of the model sees it.
    """
    weights = layer_weights(model, layer)
    gain = weights.gain.double()[:, None]
    query, key, value = (gain * w.double() for w in (weights.query, weights.key, weights.value))
    if weights.centred:
        query, key, value = (w - w.mean(1, keepdim=True) for w in (query, key, value))
    output = weights.output.double()
    if mean_is_lost(model):
        output = output - output.mean(-1, keepdim=True)
    return query, key, value, output


def sides_of_stream(model: HookedModel, layer: int) -> Sides:
    """`sides` of heads that read what heads write. ModelError for heads that read the embedding beside the stream."""
    found = sides(model, layer)
    reads, writes = found[2].shape[1], found[3].shape[2]
    if reads != writes:
        raise ModelError(
            f"the heads of {model.name} read {reads} numbers and write {writes}, so what one writes is not what "
            "another reads; circuit_rank takes each head alone"
        )
    return found
