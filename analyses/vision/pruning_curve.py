"""Pruning curve: what a model still says of a picture when patches are removed behind a layer, by four scores.

FlowCut (Tong et al. 2025) and VFlowOpt (Yang et al. 2025) judge a score by what is left when few tokens are kept; the
second by how far the last token's state moves. Tokens are removed by `PruneTokens`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from headwater.analyses._catalogue.analysis import analysis
from headwater.analyses._catalogue.settings import BatchSize, Bounds, Draws, Seed
from headwater.analyses._measures.bootstrap import intervals
from headwater.analyses._prompts.examples import Examples, as_tokens, batches_of, whole_of
from headwater.lens.edits.prune_tokens import SCORES, PruneTokens
from headwater.lens.edits.token_scores import reader_of
from headwater.lens.errors import AnalysisError, nearest
from headwater.lens.model import HookedModel
from headwater.lens.models import inputs
from headwater.lens.models.classes import logits_of
from headwater.lens.models.token_ids import token_id
from headwater.lens.naming.tokens import Tokens
from headwater.lens.progress import progress
from headwater.lens.running.forward import forward

Schedule = Literal["at_once", "adaptive"]


@analysis
def pruning_curve(
    model: HookedModel,
    examples: Examples,
    keep: Annotated[str | Sequence[float], "shares of the patches that are kept"] = "0.75 0.5 0.25 0.1",
    scores: Annotated[str | Sequence[str], "flow, attention, values, random"] = "flow attention values random",
    layer: Annotated[int | None, "the layer behind which they are gone; none: a third of the way up", Bounds(0)] = None,
    schedule: Annotated[Schedule, "remove them all there, or as FlowCut does in the layers up to it"] = "at_once",
    answers: Annotated[str | Sequence[str] | None, "the right next token of each example, or of all"] = None,
    random_draws: Annotated[int, "random choices of which the control is the mean", Bounds(1)] = 5,
    draws: Draws = 1000,
    batch_size: BatchSize = 16,
    seed: Seed = 0,
) -> xr.Dataset:  # fmt: skip
    """`drift`, `same` and, with labels, `accuracy`, each with `_low` and `_high`: [score, kept].

    `drift` is 1 - cos of the reader's last state with and without the removed patches; the reader is the class token,
    or the last token of a language model (also of one behind the tower that is pruned: `model.part("vision")`). `same`
    is the share of examples whose class or next token stays; `accuracy` is that of the class against each example's
    `label`, or of the next token against its word of `answers`, and `whole` that of the model as it is. Intervals are
    95 % bootstrap bounds over examples; the score "random" is the mean of `random_draws` choices, with the seeds from
    `seed` on, drawn for each picture anew. `patches` [kept] are left of the first picture.

    Question: How many patches does a model need, and which score finds them?
    Unit: drift: 0 to 2; the others: shares of examples.
    Source: FlowCut, Tong et al. 2025; last-token drift after VFlowOpt, Yang et al. 2025, from memory.
    Cost: scores × shares runs of all examples, and `random_draws` for the random one.
    Not for: speed, which the model's size decides (benchmarks/pruned_tokens.py); heads that pool all patches (refused).

    >>> import headwater as hw, torch, transformers
    >>> sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 16}
    >>> config = transformers.ViTConfig(image_size=32, patch_size=8, **sizes)
    >>> model = hw.load(transformers.ViTForImageClassification(config).eval())
    >>> found = hw.analyses.pruning_curve(model, torch.rand(4, 3, 32, 32), keep="1.0 0.25", draws=10)
    >>> found.drift.dims, found.drift.shape, found.patches.values.tolist(), float(found.drift[0, 0]) < 1e-6
    (('score', 'kept'), (4, 2), [16, 4], True)
    """
    shares, names = _shares(keep), _names(scores)
    place = model.layers[(len(model.layers) - 1) // 3] if layer is None else layer
    if place not in model.layers[:-1]:
        raise AnalysisError(
            f"layer={place}: patches are removed behind one of the layers {model.layers[:-1]} of {model.name}"
        )
    batches = batches_of(model, examples, batch_size)
    seen = _Reading(model)
    asked = [
        (name, share, seed + draw)
        for name in names
        for share in shares
        for draw in range(random_draws if name == "random" else 1)
    ]
    right_ones = _answers(seen.whole, answers, sum(len(batch.places) for batch in batches))
    rows: dict[int, np.ndarray] = {}
    patches: dict[float, int] = {}
    labelled = True
    for batch in progress(batches, desc="pruning curve", unit="batch"):
        tokens = as_tokens(model.to_tokens(batch.ids))
        state, said = seen(tokens)
        label = tokens.labels if right_ones is None else right_ones[batch.places]
        labelled = labelled and label is not None and (seen.classes or right_ones is not None)
        found = np.zeros((len(state), 3, len(names), len(shares)))
        for name, share, drawn in asked:
            at_random = (drawn * 2**20 + batch.places[0]) % 2**62  # no two batches share their choices
            edit = PruneTokens({place: share}, name, adaptive=schedule == "adaptive", seed=at_random)
            with model.edit(edit):
                moved, now = seen(tokens)
            drift = 1 - torch.nn.functional.cosine_similarity(moved, state, -1)
            kept = (now == said).double() if said is not None else torch.full((len(state),), torch.nan)
            right = (now == label.cpu()).double() if labelled else torch.full((len(state),), torch.nan)
            at = names.index(name), shares.index(share)
            times = random_draws if name == "random" else 1
            found[:, :, at[0], at[1]] += torch.stack([drift, kept, right], 1).numpy() / times
            patches[share] = seen.left(model, tokens, share)
        whole = (said == label.cpu()).double().numpy() if labelled else np.full(len(state), np.nan)
        rows |= {p: np.append(found[n].ravel(), whole[n]) for n, p in enumerate(batch.places)}
    table = np.stack([rows[place] for place in sorted(rows)])
    values, whole = table[:, :-1].reshape(-1, 3, len(names), len(shares)), table[:, -1]
    result: dict[str, object] = {"patches": ("kept", [patches[share] for share in shares])}
    for n, measure in enumerate(("drift", "same", "accuracy")):
        if np.isfinite(values[:, n]).all():
            labels = (measure, f"{measure}_low", f"{measure}_high")
            result |= intervals(values[:, n], ("score", "kept"), draws, seed, labels)
            result[f"{measure}_per_example"] = (("batch", "score", "kept"), values[:, n])
    attrs: dict[str, object] = {"behind": place, "schedule": schedule, "examples": len(table)}
    if labelled:
        attrs["whole"] = float(whole.mean())
    coords = {"score": names, "kept": shares, "batch": np.arange(len(table))}
    return xr.Dataset(result, coords=coords, attrs=attrs)  # type: ignore[arg-type]


class _Reading:
    """The last state of the reader, float64 [example, d_model], and what the model says: a class or the next token."""

    def __init__(self, model: HookedModel) -> None:
        self.whole = whole_of(model)
        self.reading = self.whole if self.whole.causal else model
        self.reader = reader_of(self.reading)
        self.classes = bool(self.whole.classes)

    def __call__(self, tokens: Tokens) -> tuple[Tensor, Tensor | None]:
        out = forward(self.whole, tokens, output_hidden_states=True)
        states = inputs.last_hidden(out, self.reading.part_name).double().cpu()
        place = {"class": 0, "last": -1}.get(self.reader)
        state = states.nanmean(1) if place is None else states[:, place]
        logits = logits_of(out) if self.classes or self.whole.causal else None
        if logits is None:
            return state, None
        return state, (logits[:, -1] if logits.dim() == 3 else logits).argmax(-1).cpu()

    def left(self, model: HookedModel, tokens: Tokens, share: float) -> int:
        """How many patches of the first example are left."""
        group = model.token_groups(tokens).get("image")
        if group is None:
            raise AnalysisError(
                f"{model.name} ({model.part_name}) reads no pictures; give one with image tokens"
            )
        return int(np.ceil(share * int(group[0].sum())))


def _answers(model: HookedModel, given: str | Sequence[str] | None, count: int) -> Tensor | None:
    """The ids of the right next tokens, int64 [example]."""
    if given is None:
        return None
    if not model.has_lm_head or model.classes:
        raise AnalysisError(f"answers are next tokens, and {model.name} gives none; label= is the class")
    words = [given] * count if isinstance(given, str) else list(given)
    if len(words) != count:
        raise AnalysisError(f"answers are {len(words)} words for {count} examples; give one for each")
    known = {word: token_id(model, word, "answers") for word in dict.fromkeys(words)}
    return torch.tensor([known[word] for word in words])


def _shares(keep: str | Sequence[float]) -> list[float]:
    given = keep.split() if isinstance(keep, str) else list(keep)
    try:
        found = [float(each) for each in given]
    except (TypeError, ValueError):
        raise AnalysisError(f"keep={keep!r:.60} is not a list of shares such as '0.5 0.25'") from None
    if not found or not all(0 < share <= 1 for share in found):
        raise AnalysisError(f"keep={keep!r:.60}: shares lie above 0 and up to 1")
    return list(dict.fromkeys(found))


def _names(scores: str | Sequence[str]) -> list[str]:
    found = scores.split() if isinstance(scores, str) else list(scores)
    if wrong := [name for name in found if name not in SCORES]:
        raise AnalysisError(f"unknown score {wrong[0]!r}: {nearest(wrong[0], SCORES)}")
    if not found:
        raise AnalysisError("scores is empty; give some of flow, attention, values, random")
    return list(dict.fromkeys(found))
