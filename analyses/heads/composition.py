"""Composition: how well what an earlier head writes fits what a later head reads as query, key or value.

Elhage et al. 2021, from the weights alone; every score stands beside what heads of random weights give, since thin
matrices in a small space overlap by chance.
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
from headwater.lens.model import HookedModel
from headwater.lens.models.weights import layer_weights, triangle

KINDS = ("q", "k", "v")


@analysis
def composition(
    model: HookedModel,
    draws: Annotated[int, "pairs of random heads for the baseline", Bounds(2)] = 200,
    seed: Annotated[int, "seed of the random heads", Bounds(0)] = 0,
) -> xr.Dataset:
    """`C = ‖W_OV^a W^b‖_F / (‖W_OV^a‖_F ‖W^b‖_F)` for a head a and a head b of a later layer.

    `W^b` is `W_QK` for "q", its transpose for "k" and `W_OV` for "v", rows multiplying from the left, with the gain of
    the norm in front of each layer folded in. Dataset: `score` and `excess = score - baseline` [composition, layer,
    head, to_layer, to_head], NaN where a is not below b; `baseline` and `spread` [composition]: mean and standard
    deviation of the score of heads with normal random weights of the same shapes. Turning a's directions at random
    instead, whatever the spectra, the root mean square is 1/√d_model: the attribute `turned`. Biases, MLPs between the
    two, and rotary turns are left out. An architecture whose weights are not in a known layout is refused by name.
    Unit: share. Source: Elhage's definition, from memory; the second baseline is ours.

    Question: Which later heads read what each head writes, as query, key or value?
    Unit: share of the product of the two circuits' Frobenius norms, 0 to 1.
    Source: Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits".
    Cost: d_head² · d_model multiplications for each pair of heads and kind.
    Not for: use on real inputs (patch the edge to see that); rotary QK, which turns with distance.
    """
    if model.n_layers < 2:
        raise AnalysisError(f"{model.name} has one layer with attention; heads compose across two or more")
    sides = [_sides(model, layer) for layer in model.layers]
    shape = (3, model.n_layers, model.n_heads, model.n_layers, model.n_heads)
    score = torch.full(shape, torch.nan, dtype=torch.float64)
    for low, sender in enumerate(sides):
        for high in range(low + 1, model.n_layers):
            score[:, low, :, high] = _scores(sender, sides[high])
    chance = _random(sides[0], draws, seed)
    baseline, spread = chance.mean(1), chance.std(1)
    dims = ("composition", "layer", "head", "to_layer", "to_head")
    heads = np.arange(model.n_heads)
    result = xr.Dataset(
        {
            "score": (dims, score.numpy()),
            "excess": (dims, (score - baseline[:, None, None, None, None]).numpy()),
            "baseline": ("composition", baseline.numpy()),
            "spread": ("composition", spread.numpy()),
        },
        coords={
            "composition": list(KINDS), "layer": model.layers, "head": heads, "to_layer": model.layers,
            "to_head": heads,
        },
    )  # fmt: skip
    settings = {"turned": model.d_model**-0.5}
    return result.assign_attrs(settings)


# what a layer writes and reads: query, key, value [head, d_model, d_head] and output [head, d_head, d_model]
Sides = tuple[Tensor, Tensor, Tensor, Tensor]


def _sides(model: HookedModel, layer: int) -> Sides:
    weights = layer_weights(model, layer)
    gain = weights.gain.double()[:, None]
    query, key, value = (gain * w.double() for w in (weights.query, weights.key, weights.value))
    return query, key, value, weights.output.double()


def _scores(sender: Sides, receiver: Sides) -> Tensor:
    """[kind, sender's head, receiver's head]; directions that only stand outside of a product are left out by QR."""
    _, _, value, output = sender
    query, key, into, out = receiver
    written = _norm(triangle(value) @ triangle(output.mT).mT)
    found = []
    for reads, rest in ((query, key), (key, query), (into, out.mT)):
        outer = triangle(rest).mT
        between = torch.einsum("adm,bme->abde", output, reads)
        joined = triangle(value)[:, None] @ between @ outer[None]
        found.append(_norm(joined) / (written[:, None] * _norm(triangle(reads) @ outer)))
    return torch.stack(found)


def _norm(matrices: Tensor) -> Tensor:
    return torch.linalg.matrix_norm(matrices)


def _random(like: Sides, draws: int, seed: int) -> Tensor:
    """Scores of `draws` pairs of heads with normal weights, [kind, draw]."""
    generator = torch.Generator().manual_seed(seed)

    def head() -> Sides:
        parts = [torch.randn(1, *w.shape[1:], generator=generator, dtype=torch.float64) for w in like]
        return parts[0], parts[1], parts[2], parts[3]

    return torch.stack([_scores(head(), head())[:, 0, 0] for _ in range(draws)], 1)
