"""Offsets on heads, trained on a task: a small edit in the place of fine-tuning, with random heads beside it.

The second step of LoFiT (Yin, Ye & Durrett, NeurIPS 2024, arXiv 2406.01563): a vector is added to the output of each of
a few heads, at every position. What comes out is an edit, `offsets_edit(result)`, that can be written down and applied;
the weights stay as they are. `offset_controls` asks whether the choice of the heads matters at all.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from headwater.analyses._catalogue.analysis import analysis
from headwater.analyses._catalogue.settings import Bounds
from headwater.analyses._measures.measure import Answer, AnswerSetting, PositionSetting
from headwater.analyses._prompts.examples import Examples, Loss
from headwater.analyses.heads._head_vectors import Objective, trained
from headwater.analyses.heads.localize_heads import localize_heads, most_moved
from headwater.lens.edits.heads import OffsetHeads
from headwater.lens.errors import AnalysisError
from headwater.lens.model import HookedModel
from headwater.lens.naming.heads import Head, HeadNames, chosen, every_head, named


@analysis
def fit_offsets(
    model: HookedModel,
    examples: Examples,
    heads: Annotated[HeadNames | None, 'heads, as "5.1 7.0", or "random"; none: the localised'] = None,
    count: Annotated[int, "how many heads, where they are not named", Bounds(1)] = 2,
    loss: Loss | None = None,
    answer: AnswerSetting = None,
    position: PositionSetting = -1,
    steps: Annotated[int, "steps of Adam, each on one batch", Bounds(1)] = 50,
    rate: Annotated[float, "learning rate", Bounds(0.0)] = 1e-2,
    batch_size: Annotated[int, "examples of equal length that run together", Bounds(1)] = 8,
    seed: Annotated[int, "seed of the start, of the order of batches, of random heads", Bounds(0)] = 42,
) -> xr.Dataset:
    """Train v in `z' = z + v_lh` of the chosen heads on the loss of `localize_heads`, without a price.

    v begins at N(0, 1e-3); the scales that found the heads are dropped. Dataset: `offset` [layer, head, feature]
    (0 for other heads), `trained` bool [layer, head], `training_loss` [step], `loss_before` and `loss_after` over all
    examples. Unit: nats; that of z. Source: the authors' code, checked (rate 1e-2 and seed 42 are those of 7 billion
    parameters).

    Question: How much of a task do offsets on a few heads teach?
    Unit: loss in nats with the default loss; offsets in units of the heads' outputs.
    Source: Yin, Ye & Durrett 2024, arXiv:2406.01563.
    Cost: `steps` forward and backward passes over a batch, and those of localize_heads where no heads are named.
    Not for: how well other texts are answered: `loss_after` is of the examples that were trained on.
    """
    objective = Objective.of(model, examples, loss, answer, position, batch_size)
    if heads is None:
        found = localize_heads(
            model, examples, loss, answer, position, steps=steps, batch_size=batch_size, seed=seed
        )
        picked = most_moved(found, count)
    elif heads == "random":
        picked = random_heads(model, count, seed)
    else:
        picked = named(heads, model.layers, model.n_heads)
    mask = torch.zeros(model.n_layers, model.n_heads, dtype=torch.bool)
    for layer, mine in chosen(picked, "all", model.layers, model.n_heads).items():
        mask[model.layers.index(layer)] = mine
    if not mask.any():
        raise AnalysisError('heads is empty; name at least one, as "5.1"')
    offset, history = trained(objective, moved, mask, 0.0, steps, rate, seed)
    return xr.Dataset(
        {
            "offset": (("layer", "head", "feature"), offset.numpy()),
            "trained": (("layer", "head"), mask.numpy()),
            "training_loss": ("step", np.array(history)),
            "loss_before": objective.whole(torch.zeros_like(offset), moved),
            "loss_after": objective.whole(offset, moved),
        },
        coords={"layer": model.layers, "head": np.arange(model.n_heads)},
        attrs={"heads": [str(h) for h in picked]},
    )


def moved(z: Tensor, vectors: Tensor) -> Tensor:
    """z [batch, position, head, d_head] with each head's vector added."""
    return z + vectors


def random_heads(model: HookedModel, count: int, seed: int) -> list[Head]:
    """`count` different heads."""
    every = every_head(model.layers, model.n_heads)
    if count > len(every):
        raise AnalysisError(f"count={count}, but there are {len(every)} heads; give 1 to {len(every)}")
    order = torch.randperm(len(every), generator=torch.Generator().manual_seed(seed))[:count]
    return [every[n] for n in order.tolist()]


def offsets_edit(found: xr.Dataset) -> OffsetHeads:
    """What was trained as an edit: `with model.edit(offsets_edit(result)):`; `to_dict()` writes it down."""
    offset, mask = found["offset"], found["trained"].values
    layers = found["layer"].values
    places = [(int(n), int(h)) for n, h in zip(*np.nonzero(mask), strict=True)]
    return OffsetHeads({str(Head(int(layers[n]), h)): offset.values[n, h].tolist() for n, h in places})


@analysis(like=fit_offsets)
def offset_controls(
    model: HookedModel,
    examples: Examples,
    test: Examples,
    other: Examples,
    *,
    answers: Mapping[str, Answer],
    count: Annotated[int, Bounds(1)] = 2,
    draws: Annotated[int, Bounds(1)] = 3,
    **settings: Any,
) -> xr.DataArray:
    """Loss of `test` [heads, draw] under offsets trained on `examples`, by where the heads come from.

    "own" were localised on the examples, "other" on those of another task, "random" are drawn; "none" is without an
    edit. `answers` are those of "examples", "test" and "other". Draws are seeds. What the paper found: other heads are
    worse than one's own, random ones worse still.
    """
    steps = {name: settings[name] for name in ("steps", "batch_size") if name in settings}
    judge = Objective.of(model, test, None, answers["test"], -1, 16)
    empty = torch.zeros(model.n_layers, model.n_heads, model.d_head)
    rows: dict[str, list[float]] = {"own": [], "other": [], "random": [], "none": []}
    for seed in range(draws):
        own = most_moved(
            localize_heads(model, examples, answer=answers["examples"], seed=seed, **steps), count
        )
        theirs = most_moved(localize_heads(model, other, answer=answers["other"], seed=seed, **steps), count)
        for name, heads in (("own", own), ("other", theirs), ("random", random_heads(model, count, seed))):
            names = [str(head) for head in heads]
            found = fit_offsets(model, examples, names, answer=answers["examples"], seed=seed, **settings)
            rows[name].append(judge.whole(torch.from_numpy(found["offset"].values), moved))
        rows["none"].append(judge.whole(empty, moved))
    return xr.DataArray(
        np.array(list(rows.values())), dims=("heads", "draw"), coords={"heads": list(rows)}, name="loss",
        attrs={"count": count, **settings},
    )  # fmt: skip
