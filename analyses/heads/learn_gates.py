"""Learned gates: Adam trains one gate per head, with a penalty on open gates, to keep the loss with few heads.

Hard-concrete gates with an L0 penalty (Louizos, Welling & Kingma 2018, arXiv 1712.01312), on heads as in Voita et al.
2019 (arXiv 1905.09418); or sigmoid gates with an L1 penalty. The weights of the model do not change.
"""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from headwater.analyses._catalogue.analysis import analysis
from headwater.analyses._catalogue.settings import BatchSize, Bounds
from headwater.analyses._measures.stability import told_of, unknown
from headwater.analyses._prompts.examples import (
    Examples,
    Loss,
    batches_of,
    differentiable,
    drawn_in_turn,
    loss_of,
)
from headwater.lens.model import HookedModel

STRETCH = (-0.1, 1.1)  # hard-concrete gates are stretched to this interval, then clipped to [0, 1]
TEMPERATURE = 2 / 3
OPEN = 2.0  # start of the gates' parameters, a sigmoid of 0.88


@analysis
def learn_gates(
    model: HookedModel,
    examples: Examples,
    loss: Loss | None = None,
    kind: Annotated[Literal["hard_concrete", "sigmoid"], "can close, L0; or cannot, L1"] = "hard_concrete",
    penalty: Annotated[float, "penalty if all heads are open, in units of the loss", Bounds(0.0)] = 1.0,
    steps: Annotated[int, "steps of Adam, each on one batch", Bounds(1)] = 200,
    rate: Annotated[float, "learning rate", Bounds(0.0)] = 0.1,
    batch_size: BatchSize = 16,
    seed: Annotated[int, "seed of the noise and of the order of batches", Bounds(0)] = 0,
    seeds: Annotated[int, "trainings, from `seed` on, whose open heads are held together", Bounds(1)] = 1,
) -> xr.Dataset:
    """Minimise `E[loss with gates g] + penalty · mean_h P(g_h > 0)` over one parameter `a` per head.

    Hard concrete: `g = clip(s·(ζ - γ) + γ, 0, 1)`, `s = σ((ln u - ln(1 - u) + a) / β)`, u uniform, with γ = -0.1,
    ζ = 1.1, β = 2/3, and `P(g > 0) = σ(a - β·ln(-γ/ζ))`. The result is without noise: `clip(σ(a)(ζ - γ) + γ)`.
    Sigmoid: `g = σ(a)` and the penalty is `penalty · mean g`. Every a starts at 2.
    Dataset: `gate` and `open` [layer, head], the latter P(g > 0), or g for sigmoid; `training_loss` and `expected_open`
    (mean of `open`) [step]; `loss_whole` and `loss_gated`, the mean over all examples without and with `gate`.

    With `seeds` the gates are trained from that many seeds; the result is that of the first. The attribute `stability`
    is the mean share `|a ∩ b| / |a ∪ b|` of its open heads (a gate above one half) with those of the others,
    `stability_by_chance` that of random heads as many.

    Question: How few heads does the loss need when the gates of all are trained together?
    Unit: gate, 0 closed to 1 open; loss in nats with the default loss.
    Source: Voita et al. 2019, arXiv:1905.09418; Louizos, Welling & Kingma 2018, arXiv:1712.01312; from memory, with
    the constants of the latter.
    Cost: `steps` forward and backward passes over a batch, for each of `seeds`.
    Not for: the one set of heads that matters: heads replace each other, and another seed may keep others.

    >>> import headwater as hw
    >>> model = hw.load("tasks-4l")
    >>> text = "When Mary and John went to the store , John gave a drink to"
    >>> found = hw.analyses.learn_gates(model, text, kind="sigmoid", steps=3)
    >>> found.gate.shape, bool(((found.gate > 0) & (found.gate < 1)).all())
    ((4, 8), True)
    """
    batches = batches_of(model, examples, batch_size)
    value = loss_of(model, loss)

    def trained(seed: int) -> tuple[Tensor, list[tuple[float, float]]]:
        """What opens the gates [1, layer, head], and the loss and the mean of `open` at each step."""
        generator = torch.Generator().manual_seed(seed)
        opening = torch.full((1, model.n_layers, model.n_heads), OPEN, requires_grad=True)
        adam = torch.optim.Adam([opening], lr=rate)
        history: list[tuple[float, float]] = []
        for batch in drawn_in_turn(batches, steps, generator, "learn gates"):
            with torch.enable_grad():
                gates = _gates(opening, kind, torch.rand(opening.shape, generator=generator))
                with model.gated(gates):
                    mean = differentiable(value(batch), "the loss").mean()
                share = _open(opening, kind).mean()
                # gradients of the gates alone, not of the weights
                (opening.grad,) = torch.autograd.grad(mean + penalty * share.to(mean), opening)
            adam.step()
            history.append((float(mean.detach()), float(share.detach())))
        return opening.detach(), history

    opening, history = trained(seed)
    others = [trained(seed + more)[0] for more in range(1, seeds)]
    with torch.no_grad():
        gates, share = _gates(opening, kind, None), _open(opening, kind)[0]
        whole = torch.cat([value(batch) for batch in batches]).mean()
        with model.gated(gates):
            left = torch.cat([value(batch) for batch in batches]).mean()
    told = np.array(history)
    own, *rest = (
        set(map(tuple, (_gates(each, kind, None) > 0.5).nonzero().tolist())) for each in (opening, *others)
    )
    over = f"{len(rest)} other seed{'s' * (len(rest) > 1)}"
    again = (
        told_of(own, rest, opening.numel(), over)
        if rest
        else unknown("one seed; seeds=5 trains from others too")
    )
    return xr.Dataset(
        {
            "gate": (("layer", "head"), gates[0].detach().numpy()),
            "open": (("layer", "head"), share.numpy()),
            "training_loss": ("step", told[:, 0]),
            "expected_open": ("step", told[:, 1]),
            "loss_whole": float(whole),
            "loss_gated": float(left),
        },
        coords={"layer": model.layers, "head": np.arange(model.n_heads), "step": np.arange(steps)},
        attrs=again,
    )


def _gates(opening: Tensor, kind: str, noise: Tensor | None) -> Tensor:
    """Gates [1, layer, head]; without noise, the gates of the result."""
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
