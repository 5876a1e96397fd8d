"""Learned gates: how few heads the loss can do with, found by training one gate per head with a price on open ones.

Louizos, Welling & Kingma 2018 (arXiv 1712.01312: hard-concrete gates, L0) as Voita et al. 2019 (arXiv 1905.09418) put
them on heads; or sigmoid gates with an L1 price. The weights of the model stay as they are. From memory.
"""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from headwater.analyses._catalogue.analysis import analysis
from headwater.analyses._catalogue.settings import Bounds
from headwater.analyses._prompts.examples import Examples, Loss, batches_of, drawn_in_turn, loss_of
from headwater.lens.model import HookedModel

STRETCH = (-0.1, 1.1)  # the interval that hard-concrete gates are stretched to before they are cut to [0, 1]
TEMPERATURE = 2 / 3
OPEN = 2.0  # where the gates' parameters begin: a sigmoid of 0.88


@analysis
def learn_gates(
    model: HookedModel,
    examples: Examples,
    loss: Loss | None = None,
    kind: Annotated[
        Literal["hard_concrete", "sigmoid"], "gates that can close, with L0; or plain, with L1"
    ] = ("hard_concrete"),
    penalty: Annotated[float, "price of all heads being open, in units of the loss", Bounds(0.0)] = 1.0,
    steps: Annotated[int, "steps of Adam, each on one batch", Bounds(1)] = 200,
    rate: Annotated[float, "learning rate", Bounds(0.0)] = 0.1,
    batch_size: Annotated[int, "examples of equal length that run together", Bounds(1)] = 16,
    seed: Annotated[int, "seed of the noise and of the order of batches", Bounds(0)] = 0,
) -> xr.Dataset:
    """Minimise `E[loss with gates g] + penalty · mean_h P(g_h > 0)` over one parameter `a` per head.

    Hard concrete: `g = clip(s·(ζ - γ) + γ, 0, 1)`, `s = σ((ln u - ln(1 - u) + a) / β)`, u uniform, with γ = -0.1,
    ζ = 1.1, β = 2/3, and `P(g > 0) = σ(a - β·ln(-γ/ζ))`; the gate reported is without noise: `clip(σ(a)(ζ - γ) + γ)`.
    Sigmoid: `g = σ(a)` and the price is `penalty · mean g`. All begin at a = 2.
    Dataset: `gate` and `open` (that probability; for sigmoid the gate) [layer, head]; `training_loss` and
    `expected_open` (mean of `open`) [step]; `loss_whole` and `loss_gated`, over all examples, without gates and with
    those reported. Unit: gate; that of the loss. Source: from memory; the constants are those of the first paper.

    Question: How few heads does the loss need when the gates of all are trained together?
    Unit: gate, 0 closed to 1 open; loss in nats with the default loss.
    Source: Voita et al. 2019, arXiv:1905.09418; Louizos, Welling & Kingma 2018, arXiv:1712.01312.
    Cost: `steps` forward and backward passes over a batch.
    Not for: the one set of heads that matters: heads stand in for each other, and another seed may keep others.
    """
    batches = batches_of(model, examples, batch_size)
    value = loss_of(model, loss)
    generator = torch.Generator().manual_seed(seed)
    opening = torch.full((1, model.n_layers, model.n_heads), OPEN, requires_grad=True)
    adam = torch.optim.Adam([opening], lr=rate)
    history: list[tuple[float, float]] = []
    for batch in drawn_in_turn(batches, steps, generator, "learn gates"):
        with torch.enable_grad():
            gates = _gates(opening, kind, torch.rand(opening.shape, generator=generator))
            with model.gated(gates):
                mean = value(batch).mean()
            share = _open(opening, kind).mean()
            # gradients of the gates alone: the model's weights get none
            (opening.grad,) = torch.autograd.grad(mean + penalty * share.to(mean), opening)
        adam.step()
        history.append((float(mean.detach()), float(share.detach())))
    with torch.no_grad():
        gates, share = _gates(opening, kind, None), _open(opening, kind)[0]
        whole = torch.cat([value(batch) for batch in batches]).mean()
        with model.gated(gates):
            left = torch.cat([value(batch) for batch in batches]).mean()
    told = np.array(history)
    result = xr.Dataset(
        {
            "gate": (("layer", "head"), gates[0].detach().numpy()),
            "open": (("layer", "head"), share.numpy()),
            "training_loss": ("step", told[:, 0]),
            "expected_open": ("step", told[:, 1]),
            "loss_whole": float(whole),
            "loss_gated": float(left),
        },
        coords={"layer": model.layers, "head": np.arange(model.n_heads), "step": np.arange(steps)},
    )
    return result


def _gates(opening: Tensor, kind: str, noise: Tensor | None) -> Tensor:
    """Gates [1, layer, head]; without noise, those that are reported."""
    if kind == "sigmoid":
        return opening.sigmoid()
    drawn = opening
    if noise is not None:
        noise = noise.clamp(1e-6, 1 - 1e-6)
        drawn = (noise.logit() + opening) / TEMPERATURE
    low, high = STRETCH
    return (drawn.sigmoid() * (high - low) + low).clamp(0, 1)


def _open(opening: Tensor, kind: str) -> Tensor:
    """P(gate > 0), or the gate itself."""
    low, high = STRETCH
    shift = TEMPERATURE * float(np.log(-low / high)) if kind == "hard_concrete" else 0.0
    return (opening - shift).sigmoid()
