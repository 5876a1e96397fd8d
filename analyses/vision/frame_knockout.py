"""Frame knockout: which answers of a video model need attention between frames, along places, or inside of frames.

Each part of the attention is cut in turn (`recipes.space_time_knockout`), and as many random pairs as a control.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, cast, get_args

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from headwater.analyses._catalogue.analysis import analysis
from headwater.analyses._catalogue.settings import BatchSize, Bounds, Draws
from headwater.analyses._measures.bootstrap import intervals
from headwater.analyses._prompts.examples import Examples, batches_of, outputs_of
from headwater.lens.edits.pair_masks import MaskPairs
from headwater.lens.errors import AnalysisError
from headwater.lens.model import HookedModel
from headwater.lens.naming.heads import HeadNames
from headwater.lens.progress import progress
from headwater.lens.recipes.video import Hidden, space_time_knockout

Read = Callable[[Tensor], Tensor]  # outputs [batch, …] → scores [batch, answer]


@analysis
def frame_knockout(
    model: HookedModel,
    examples: Examples,
    read: Read | None = None,
    reach: Annotated[int, "rows and columns that count as the same place", Bounds(0)] = 1,
    heads: Annotated[HeadNames, 'heads that are cut, such as "2.1 3.0"; "all" for every one'] = "all",
    controls: Annotated[int, "draws of random pairs, whose results are averaged", Bounds(1)] = 3,
    draws: Draws = 1000,
    seed: Annotated[int, "seed of the random pairs and of the intervals", Bounds(0)] = 0,
    batch_size: BatchSize = 16,
) -> xr.Dataset:
    """`kept[t]` = share of videos whose most likely answer stays when the pairs of `treatment` t are hidden.

    `treatment` is "other_frames": patches see their own frame alone; "same_places": patches do not see, in other
    frames, those at most `reach` rows and columns away; "own_frame": patches do not see the rest of their own frame;
    "random": as many random patches are hidden from each as by "other_frames", `controls` draws averaged. `kept`,
    `low`, `high` [treatment] are the mean over videos and its 95 % bootstrap bounds; `per_example` [treatment, batch]
    has each video, `divergence` [treatment, batch] KL(plain ‖ cut) of the answers' probabilities, and `hidden`
    [treatment] the share of pairs of tokens that is hidden, the mean over videos. Answers are the model's classes;
    `read(logits)` may join them, such as the movement of "three left": `lambda x: x.view(-1, 10, 3).logsumexp(1)`.

    Question: What does a video model need other frames for?
    Unit: share of videos, 0 to 1; divergence: nats.
    Source: ours, after the knockout of Geva et al. 2023, arXiv:2304.14767.
    Cost: 3 + controls passes per batch and one plain one.
    Not for: what other frames would tell a model that was trained without them: the cut model is used as it is.

    >>> import random
    >>> import headwater as hw
    >>> from headwater.data.pictures.films import film
    >>> model, rng = hw.load("video-digits"), random.Random(0)
    >>> films = [hw.Example(image=film(rng, held_out=True).frames()) for _ in range(20)]
    >>> move = lambda logits: logits.view(-1, 10, 3).logsumexp(1)
    >>> found = hw.analyses.frame_knockout(model, films, read=move, controls=1, draws=10)
    >>> bool(found.kept.sel(treatment="other_frames") < found.kept.sel(treatment="random"))
    True
    """
    if read is None and not model.classes:
        raise AnalysisError(
            f"{model.name} has no classes to answer with; give read=, a function of its outputs → [batch, answer]"
        )
    batches, outputs = batches_of(model, examples, batch_size), outputs_of(model)
    count = sum(len(batch.places) for batch in batches)
    treatments = get_args(Hidden)
    kept = torch.zeros(len(treatments), count, dtype=torch.float64)
    divergence, hidden = torch.zeros_like(kept), np.zeros(len(treatments))
    settings: dict[str, Any] = {"reach": reach, "heads": heads}
    for batch in progress(batches, desc="frame knockout", unit="batch"):
        plain = _scores(read, outputs(batch.ids)).log_softmax(-1)
        for place, hide in enumerate(treatments):
            seeds = range(seed, seed + controls) if hide == "random" else [seed]
            for each in seeds:
                edits = space_time_knockout(model, batch.ids, hide=hide, seed=each, **settings)
                with model.edit(*edits):
                    cut = _scores(read, outputs(batch.ids)).log_softmax(-1)
                kept[place, batch.places] += (cut.argmax(-1) == plain.argmax(-1)).double().cpu() / len(seeds)
                far = (plain.exp() * (plain - cut)).sum(-1)
                divergence[place, batch.places] += far.double().cpu() / len(seeds)
                share = float((~cast(MaskPairs, edits[0]).rule).double().mean())
                hidden[place] += share * len(batch.places) / (count * len(seeds))
    return xr.Dataset(
        {
            **intervals(kept.T.numpy(), ("treatment",), draws, seed, ("kept", "low", "high")),
            "hidden": ("treatment", hidden),
            "per_example": (("treatment", "batch"), kept.numpy()),
            "divergence": (("treatment", "batch"), divergence.numpy()),
        },
        coords={"treatment": list(treatments), "batch": np.arange(count)},
        attrs={"examples": count},
    )


def _scores(read: Read | None, outputs: Tensor) -> Tensor:
    found = outputs if read is None else read(outputs)
    if not isinstance(found, Tensor) or found.dim() != 2 or len(found) != len(outputs) or found.shape[1] < 2:
        got = f"shape {list(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        raise AnalysisError(f"read must return scores [batch, answer] of at least two answers; got {got}")
    if bool(found.isnan().any()):
        raise AnalysisError("read gives scores that are no numbers (NaN), of which none is the most likely")
    return found.double()
