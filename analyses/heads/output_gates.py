"""Output gates: how far each head's output is let through in front of the output projection.

Gated attention multiplies what a head gathered by the activation of a projection of the query's own stream (Qwen3-Next,
Qwen3.5, AFMoE …). A gate near 0 does what an attention sink does elsewhere: the head writes nothing.
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from headwater.analyses._catalogue.analysis import analysis
from headwater.analyses._catalogue.settings import BatchSize, Bounds
from headwater.analyses._prompts.examples import Examples
from headwater.analyses._prompts.texts import Texts
from headwater.kernels.maps.attention_map import AttentionMap
from headwater.lens.errors import AnalysisError
from headwater.lens.model import HookedModel
from headwater.lens.running.output_gates import gates_of_run


@analysis
def output_gates(
    model: HookedModel,
    examples: Examples,
    below: Annotated[float, "a factor below this counts as shut", Bounds(0.0)] = 0.1,
    batch_size: BatchSize = 16,
) -> xr.Dataset:
    """Statistics of the gate g [batch, layer, head, query, feature] of every head.

    `gate_mean` and `shut` [batch, layer, head, query]: the mean over features, and the share of features whose factor
    is below `below`. `effective_mass` `Σ_j A_ij ‖g_i ⊙ v_j‖` is what the weights carry behind the gate, and
    `ungated_mass` `Σ_j A_ij ‖v_j‖` what they would carry without it. A model with one factor per head has the same
    factor in all features. Layers without a gate have NaN; AnalysisError where no layer has one.

    Question: How far does each head let through what it gathered?
    Unit: factor on the head's output; share of features; norm of a value vector.
    Source: Qiu et al. 2025, arXiv:2505.06708, who give mean scores and shares below a threshold; compared with hooks.
    Cost: one forward pass, one more of each attention, and one pass over the weights in blocks of rows.
    Not for: what a head writes (norms), or what the model uses of it; sums of norms are no norm of a sum.

    >>> import headwater as hw
    >>> model = hw.load("tasks-4l")
    >>> try:
    ...     hw.analyses.output_gates(model, "Mary gave John a drink")
    ... except hw.HeadwaterError as error:
    ...     print(error)
    no layer of tasks-4l has an output gate
    """
    texts = Texts.of(model, examples, batch_size)
    found = {name: texts.empty(model.n_layers, model.n_heads) for name in NAMES}
    for batch in texts.batches:
        gates = gates_of_run(model, batch.ids)
        if all(gate is None for _, gate in gates.values()):
            raise AnalysisError(f"no layer of {model.name} has an output gate")
        for name, values in zip(NAMES, _measured(model, gates, below), strict=True):
            texts.spread(batch, values, found[name])
    units = {"gate_mean": "factor", "shut": "share", "effective_mass": "norm", "ungated_mass": "norm"}
    coordinates = {
        "batch": np.arange(len(texts.valid)), "layer": model.layers, "head": np.arange(model.n_heads),
        "query_token": (("batch", "query"), np.array(texts.strings)),
    }  # fmt: skip
    return xr.Dataset(
        {n: (("batch", "layer", "head", "query"), v.numpy(), {"unit": units[n]}) for n, v in found.items()},
        coords=coordinates,
    )


NAMES = ("gate_mean", "shut", "effective_mass", "ungated_mass")


def _measured(model: HookedModel, gates: dict, below: float) -> list[Tensor]:
    """The four statistics [text, layer, head, query]."""
    rows: list[list[Tensor]] = []
    for layer in model.layers:
        heads, gate = gates[layer]
        map, value, _ = heads.layers[layer]
        if gate is None:
            rows.append([torch.full(map.shape[:3], torch.nan).double()] * len(NAMES))
            continue
        gate = gate.double()
        value = value.double().repeat_interleave(map.shape[1] // value.shape[1], 1)
        masses = [_mass(map, value, g) for g in (gate, torch.ones_like(gate))]
        rows.append([gate.mean(-1), (gate < below).double().mean(-1), *masses])
    return [torch.stack(each, 1) for each in zip(*rows, strict=True)]


def _mass(map: AttentionMap, value: Tensor, gate: Tensor) -> Tensor:
    """`Σ_j A_ij ‖g_i ⊙ v_j‖`, [batch, head, query], a block of rows at a time."""
    found = torch.zeros(map.shape[:3], dtype=torch.float64, device=value.device)
    squares = value.square().mT
    for span, weights in map.row_blocks():
        lengths = (gate[:, :, span].square() @ squares).clamp_min(0).sqrt()
        found[:, :, span] = (weights.double() * lengths).sum(-1)
    return found
