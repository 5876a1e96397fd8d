"""Composition: how much the output of an earlier head overlaps with the query, key or value input of a later head.

Elhage et al. 2021, from the weights alone. Thin matrices in a small space overlap by chance, so the result also has the
score of heads with random weights.
"""

from __future__ import annotations

import itertools
from typing import Annotated, Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from headwater.analyses._catalogue.analysis import analysis
from headwater.analyses._catalogue.settings import Bounds
from headwater.analyses._prompts.positions import Positions
from headwater.analyses.heads.circuit_rank import Sides, sides_of_stream
from headwater.lens.errors import AnalysisError
from headwater.lens.model import HookedModel
from headwater.lens.models.weights import triangle
from headwater.lens.naming.heads import chosen_layers

KINDS = ("q", "k", "v")


@analysis
def composition(
    model: HookedModel,
    draws: Annotated[int, "pairs of random heads for the baseline", Bounds(2)] = 200,
    seed: Annotated[int, "seed of the random heads", Bounds(0)] = 0,
    to_layers: Annotated[Positions, 'layers of the heads that read, or "all"'] = "all",
) -> xr.Dataset:
    """`C = ‖W_OV^a W^b‖_F / (‖W_OV^a‖_F ‖W^b‖_F)` for a head a and a head b of a later layer, one of `to_layers`.

    `W^b` is `W_QK` for "q", its transpose for "k" and `W_OV` for "v"; vectors are rows. The gain of the norm before
    each layer is folded in; the mean over d_model, which LayerNorm takes out, is left out.
    Dataset: `score` and `excess = score - baseline` [composition, layer, head, to_layer,
    to_head], NaN unless a is below b; `baseline` and `spread` [composition], the mean and standard deviation of the
    score of heads with normal random weights of the same shapes. A second baseline rotates the directions of a at
    random: its root mean square is 1/√d_model for any spectra (attribute `turned`). Biases, rotary positions and MLPs
    between the two are left out. ModelError names a model whose weights have no known layout.

    Question: Which later heads read what each head writes, as query, key or value?
    Unit: share of the product of the two circuits' Frobenius norms, 0 to 1.
    Source: Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits", from memory; `turned` is ours.
    Cost: d_head² · d_model multiplications for each pair of heads and kind.
    Not for: use on real inputs (patch the edge to see that); rotary QK, which turns with distance.

    >>> import headwater as hw
    >>> model = hw.load("tasks-4l")
    >>> found = hw.analyses.composition(model, draws=5)
    >>> found.score.sel(composition="k", layer=0, to_layer=1).shape  # heads of layer 0, heads of layer 1
    (8, 8)
    """
    if model.n_layers < 2:
        raise AnalysisError(f"{model.name} has one layer with attention; heads compose across two or more")
    reading = chosen_layers(to_layers, model.layers)
    below = [layer for layer in model.layers if layer <= max(reading)]
    sides = {layer: sides_of_stream(model, layer) for layer in below}
    shape = (3, model.n_layers, model.n_heads, len(reading), model.n_heads)
    score = torch.full(shape, torch.nan, dtype=torch.float64)
    for (place, low), (to, high) in itertools.product(enumerate(below), enumerate(reading)):
        if low < high:
            score[:, place, :, to] = _scores(sides[low], sides[high])
    chance = _random(sides[below[0]], draws, seed)
    baseline, spread = chance.mean(1), chance.std(1)
    dims = ("composition", "layer", "head", "to_layer", "to_head")
    heads = np.arange(model.n_heads)
    return xr.Dataset(
        {
            "score": (dims, score.numpy()),
            "excess": (dims, (score - baseline[:, None, None, None, None]).numpy()),
            "baseline": ("composition", baseline.numpy()),
            "spread": ("composition", spread.numpy()),
        },
        coords={
            "composition": list(KINDS), "layer": model.layers, "head": heads, "to_layer": reading,
            "to_head": heads,
        },
        attrs={"turned": model.d_model**-0.5},
    )  # fmt: skip


def _scores(sender: Sides, receiver: Sides) -> Tensor:
    """[kind, sender's head, receiver's head].

    A matrix at the outer end of a product is replaced by its triangle of the QR decomposition: the norm is the same.
    """
    norm = torch.linalg.matrix_norm
    _, _, value, output = sender
    query, key, into, out = receiver
    written = norm(triangle(value) @ triangle(output.mT).mT)
    found = []
    for reads, rest in ((query, key), (key, query), (into, out.mT)):
        outer = triangle(rest).mT
        between = torch.einsum("adm,bme->abde", output, reads)
        joined = triangle(value)[:, None] @ between @ outer[None]
        found.append(norm(joined) / (written[:, None] * norm(triangle(reads) @ outer)))
    return torch.stack(found)


def _random(like: Sides, draws: int, seed: int) -> Tensor:
    """Scores of `draws` pairs of heads with normal weights, [kind, draw]."""
    generator = torch.Generator().manual_seed(seed)

    def head() -> Any:
        return [torch.randn(1, *w.shape[1:], generator=generator, dtype=torch.float64) for w in like]

    return torch.stack([_scores(head(), head())[:, 0, 0] for _ in range(draws)], 1)
