"""Circuit rank: how many directions a head's QK and OV circuits really use.

The circuits are products of two thin matrices (Elhage et al. 2021), so their singular values come from a
d_head × d_head matrix; the d_model × d_model ones are never made. Says nothing of the inputs that really come.
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from headwater.analyses._catalogue.analysis import analysis
from headwater.analyses._catalogue.settings import Bounds
from headwater.lens.model import HookedModel
from headwater.lens.models.weights import layer_weights, triangle

CIRCUITS = ("qk", "ov")


@analysis
def circuit_rank(
    model: HookedModel,
    tolerance: Annotated[
        float, "singular values below this share of the largest count as zero", Bounds(0.0, 1.0)
    ] = (1e-5),
) -> xr.Dataset:
    """Ranks of `W_QK = W_Q W_Kᵀ` and `W_OV = W_V W_O` of each query head, with the gain of the norm in front folded in.

    `rank` is the number of singular values above `tolerance` times the largest, `stable_rank = ‖W‖_F² / ‖W‖₂²`, and
    `frobenius` and `spectral` are these norms; all [circuit, layer, head]. `singular_values` [circuit, layer, head,
    direction], largest first. A circuit of zeros has rank 0 and no stable rank (NaN). Biases, rotary turns (the circuit
    is that of distance 0) and soft caps are left out. An architecture whose weights are not in a known layout is
    refused by name. Unit: directions. Source: the definitions, from memory.

    Question: How many directions do the QK and OV circuits of each head use?
    Unit: directions; norms in units of the weights.
    Source: Elhage et al. 2021 (the circuits); stable rank: Rudelson & Vershynin 2007.
    Cost: two QR decompositions and one d_head × d_head singular value problem per head and circuit.
    Not for: what a head does on real inputs; comparing QK of rotary models, whose circuit turns with distance.
    """
    values = torch.stack([_singular_values(model, layer) for layer in model.layers], 1).cpu()
    spectral, frobenius = values[..., 0], values.square().sum(-1).sqrt()
    found = {
        "rank": (values > tolerance * spectral[..., None]).sum(-1),
        "stable_rank": (frobenius / spectral).square(),  # 0 / 0 is NaN
        "frobenius": frobenius,
        "spectral": spectral,
    }
    dims = ("circuit", "layer", "head")
    result = xr.Dataset(
        {name: (dims, numbers.numpy()) for name, numbers in found.items()},
        coords={"circuit": list(CIRCUITS), "layer": model.layers, "head": np.arange(model.n_heads)},
    ).assign(singular_values=((*dims, "direction"), values.numpy()))
    return result


def _singular_values(model: HookedModel, layer: int) -> Tensor:
    """Of QK and OV of one layer, [circuit, head, direction] in float64."""
    weights = layer_weights(model, layer)
    gain = weights.gain.double()[:, None]
    query, key, value = (gain * w.double() for w in (weights.query, weights.key, weights.value))
    return torch.stack([of_product(query, key), of_product(value, weights.output.double().mT)])


def of_product(left: Tensor, right: Tensor) -> Tensor:
    """Singular values of `left @ rightᵀ`, both [head, d_model, d_head], largest first."""
    return torch.linalg.svdvals(triangle(left) @ triangle(right).mT)
