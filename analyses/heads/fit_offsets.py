"""Offsets on heads, trained on a task: a small edit instead of fine-tuning.

The second step of LoFiT (Yin, Ye & Durrett, NeurIPS 2024, arXiv 2406.01563): a trained vector is added to the output of
each of a few heads, at every position. The weights do not change. `offsets_edit(result)` gives the vectors as an edit
that can be saved and applied. `offset_controls` compares the chosen heads with other heads.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from headwater.analyses._catalogue.analysis import analysis
from headwater.analyses._catalogue.settings import BatchSize, Bounds
from headwater.analyses._measures.measure import Answer, AnswerSetting, PositionSetting
from headwater.analyses._prompts.examples import Examples, Loss
from headwater.analyses.heads._head_vectors import Objective
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
    batch_size: BatchSize = 8,
    seed: Annotated[int, "seed of the start, of the order of batches, of random heads", Bounds(0)] = 42,
) -> xr.Dataset:
    """Train v in `z' = z + v_lh` of the chosen heads on the loss of `localize_heads`, without a penalty.

    v starts at N(0, 1e-3); the scales that ranked the heads are not applied. Dataset: `offset` [layer, head, feature],
    which is v and 0 for other heads; `trained` bool [layer, head]; `training_loss` [step]; `loss_before` and
    `loss_after`, means over all examples. The attribute `heads` lists the heads.

    Question: How much of a task do offsets on a few heads teach?
    Unit: loss in nats with the default loss; offsets in units of the heads' outputs.
    Source: Yin, Ye & Durrett 2024, arXiv:2406.01563; held to the authors' code and settings for 7 billion parameters.
    Cost: `steps` forward and backward passes over a batch; as many for localize_heads unless heads are named.
    Not for: how well other texts are answered: `loss_after` is of the training examples.

    >>> import headwater as hw
    >>> model = hw.load("tasks-4l")
    >>> texts = ["When Mary and John went to the store , John gave a drink to"]
    >>> found = hw.analyses.fit_offsets(model, texts, "3.1", answer="Mary", steps=3)
    >>> bool(found.loss_after < found.loss_before), int(found.trained.sum())
    (True, 1)
    """
    objective = Objective.of(moved, model, examples, loss, answer, position, batch_size)
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
    fitted = objective.trained("offset", mask, 0.0, steps, rate, seed)
    fitted = fitted.assign(trained=(("layer", "head"), mask.numpy()))
    return fitted.assign_attrs(heads=[str(head) for head in picked])


def moved(z: Tensor, vectors: Tensor) -> Tensor:
    """z [batch, position, head, d_head] with each head's vector added."""
    return z + vectors


def random_heads(model: HookedModel, count: int, seed: int) -> list[Head]:
    """`count` different heads, drawn with `seed`."""
    every = every_head(model.layers, model.n_heads)
    if count > len(every):
        raise AnalysisError(f"count={count}, but there are {len(every)} heads; give 1 to {len(every)}")
    order = torch.randperm(len(every), generator=torch.Generator().manual_seed(seed))[:count]
    return [every[n] for n in order.tolist()]


def offsets_edit(found: xr.Dataset) -> OffsetHeads:
    """The trained offsets as an edit; its `to_dict()` is JSON data.

    >>> import headwater as hw
    >>> model = hw.load("tasks-4l")
    >>> found = hw.analyses.fit_offsets(model, "When Mary and John went to the store", "3.1", steps=1)
    >>> edit = hw.analyses.offsets_edit(found)
    >>> with model.edit(edit):
    ...     logits = model("When Mary and John went to the store")
    >>> list(edit.to_dict()["offsets"])
    ['3.1']
    """
    layers = found["layer"].values
    places = [(int(n), int(h)) for n, h in np.argwhere(found["trained"].values)]
    return OffsetHeads(
        {str(Head(int(layers[n]), h)): found["offset"].values[n, h].tolist() for n, h in places}
    )


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
    """Loss of the texts `test` [heads, draw] under offsets trained on `examples`, for different choices of heads.

    Heads "own" were localised on `examples` and heads "other" on the texts `other` of another task; "random" heads are
    drawn; "none" is the loss without an edit. `answers` has the answers of "examples", "test" and "other". Each draw
    has its own seed. In the paper "other" is worse than "own", and "random" is worse than "other".

    >>> import headwater as hw
    >>> model = hw.load("tasks-4l")
    >>> texts = [f"When Mary and John went to the store , {name} gave a drink to" for name in ("John", "Mary")]
    >>> answers = {"examples": "Mary", "test": "John", "other": "Mary"}
    >>> found = hw.analyses.offset_controls(
    ...     model, texts[:1], texts[1:], texts[:1], answers=answers, draws=1, steps=1
    ... )
    >>> found.heads.values.tolist(), found.shape
    (['own', 'other', 'random', 'none'], (4, 1))
    """
    steps = {name: settings[name] for name in ("steps", "batch_size") if name in settings}
    judge = Objective.of(moved, model, test, None, answers["test"], -1, 16)
    empty = torch.zeros(model.n_layers, model.n_heads, model.d_value)
    rows: dict[str, list[float]] = {"own": [], "other": [], "random": [], "none": []}
    for seed in range(draws):
        picked = {"random": random_heads(model, count, seed)}
        for name, texts, of in (("own", examples, "examples"), ("other", other, "other")):
            localised = localize_heads(model, texts, answer=answers[of], seed=seed, **steps)
            picked[name] = most_moved(localised, count)
        for name, heads in picked.items():
            found = fit_offsets(model, examples, heads, answer=answers["examples"], seed=seed, **settings)
            rows[name].append(judge.whole(torch.from_numpy(found["offset"].values)))
        rows["none"].append(judge.whole(empty))
    return xr.DataArray(
        np.array(list(rows.values())), dims=("heads", "draw"), coords={"heads": list(rows)}, name="loss",
        attrs={"count": count, **settings},
    )  # fmt: skip
