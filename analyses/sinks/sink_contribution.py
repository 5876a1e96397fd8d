"""Sink contribution: the share of each head's output that comes from sinks, and the prediction without their values.

A weight near 1 on a value near 0 carries nothing. The values of the sinks are set to zero in all layers and heads at
once, without renormalising the other weights; the values of as many random keys are the control. The sink also takes
attention away from other keys: `redistribution_study` measures that effect.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from headwater.analyses._catalogue.analysis import analysis
from headwater.analyses._catalogue.settings import BatchSize, Bounds, Draws
from headwater.analyses._measures.bootstrap import interval, intervals
from headwater.analyses._prompts.examples import Batch, Examples, outputs_of
from headwater.analyses._prompts.texts import Texts
from headwater.analyses.sinks._control_keys import control_keys
from headwater.analyses.sinks._sink_keys import KeysSetting, RuleSetting, ThresholdSetting, sink_keys
from headwater.analyses.sinks._uniform_map import even_map
from headwater.kernels.tiles.block import Block
from headwater.kernels.tiles.mask import Mask
from headwater.lens.attention.context import ActiveEdit, Lowered
from headwater.lens.errors import AnalysisError
from headwater.lens.model import HookedModel
from headwater.lens.models.classes import is_span
from headwater.lens.models.signature import compares
from headwater.lens.progress import progress
from headwater.lens.records.record import Record

OF = ("sinks", "control")


@analysis
def sink_contribution(
    model: HookedModel,
    examples: Examples,
    keys: KeysSetting = 0,
    rule: RuleSetting = None,
    threshold: ThresholdSetting = None,
    controls: Annotated[int, "sets of random keys, whose results are averaged", Bounds(1)] = 4,
    draws: Draws = 1000,
    seed: Annotated[int, "seed of the random keys and of the draws", Bounds(0)] = 0,
    batch_size: BatchSize = 16,
) -> xr.Dataset:
    """`share` [of, batch, layer, head]: `‖Σ_{j in K} A_ij v_j‖ / ‖z_i‖`, `z_i = Σ_j A_ij v_j`, mean over queries i.

    K are the sinks of the head (`of` = "sinks") or as many other keys of the text, drawn at random ("control", the mean
    of `controls` draws). Only queries that see keys inside and outside of K count; a head without such queries is NaN.
    `kl` [of, batch]: `KL(p ‖ p')` of the next-token distributions, mean over positions. In p' `A_ij v_j` is 0 for all j
    in K, in all heads of the part and layers at once, and the other weights do not change; a classifier's distributions
    are over its classes. `logit_change` [of, batch]: the root
    mean square over the vocabulary of the centred change of the logits, mean over positions. `mean`, `low`, `high`
    [measure, of] of both over texts (two towers have `similarity_change` in their place, the absolute change of the
    cosine similarity of each text and its own picture; models without a distribution `output_change`, the root mean
    square change of what they give), with 95 % bootstrap bounds; `beyond` [measure, bound], mean and bounds of the
    paired difference sinks minus control.

    Question: What does a sink carry: how much of the heads' outputs, and of the prediction?
    Unit: share: ‖part of z from the keys‖ / ‖z‖; kl: nats; logit_change: logits.
    Source: ours; Gu et al., ICLR 2025, arXiv:2410.10781, observed that the values of sinks are small.
    Cost: one recording with values and 2 + controls forward passes per batch, edited attention in blocks of rows.
    Not for: what the sink is for: it may take attention away from other keys; parts of z that cancel.

    >>> import headwater as hw
    >>> model = hw.load("tasks-4l")
    >>> text = "When Mary and John went to the store , John gave a drink to"
    >>> found = hw.analyses.sink_contribution(model, text, controls=1, draws=10)
    >>> found.share.shape, bool(found.kl.sel(of="sinks") > found.kl.sel(of="control"))
    ((2, 1, 4, 8), True)
    """
    if model.read_only:
        raise AnalysisError(f"the prediction of {model.name} without a value is not known: {model.read_only}")
    measures = _measures(model)
    texts = Texts.of(model, examples, batch_size)
    count = len(texts.valid)
    share = np.full((2, count, model.n_layers, model.n_heads), np.nan)
    change = np.full((2, count, len(measures)), np.nan)  # of, text, measure
    keep = ("qkv", "residual") if rule == "massive" else ("qkv",)
    for batch in progress(texts.batches, desc="sink contribution", unit="batch"):
        record = model.record(batch.ids, statistics=("received", "visible"), keep=keep)
        sinks = sink_keys(record, keys, rule, threshold)
        plain = outputs_of(model)(batch.ids)
        anywhere = torch.ones_like(sinks[:, 0, 0])
        sets = [
            [sinks],
            [control_keys(sinks, anywhere, batch.places, seed, draw) for draw in range(controls)],
        ]
        for of, drawn in enumerate(sets):
            share[of, batch.places] = torch.stack([_shares(record, flags) for flags in drawn]).nanmean(0)
            found = [_changes(model, batch, plain, flags) for flags in drawn]
            change[of, batch.places] = torch.stack(found).mean(0)
    result = xr.Dataset(
        {
            "share": (("of", "batch", "layer", "head"), share),
            **{name: (("of", "batch"), change[..., n]) for n, name in enumerate(measures)},
        },
        coords={"of": list(OF), "layer": model.layers, "head": np.arange(model.n_heads), "measure": measures},
    )
    result = result.assign(intervals(change.transpose(1, 2, 0), ("measure", "of"), draws, seed))
    result["beyond"] = (("measure", "bound"), np.stack(interval(change[0] - change[1], draws, seed), -1))
    result = result.assign_coords(bound=["mean", "low", "high"])
    return result.assign_attrs(keys=keys if rule is None else None, examples=count)


@dataclass(frozen=True, eq=False)
class _WithoutValues:
    """A weight edit that sets the weights on chosen keys to 0 and does not change the others."""

    head_keys: Tensor  # [text, head, key]

    def resolve(self, weights: Tensor, block: Block, mask: Mask, live: Tensor) -> tuple[Tensor, ...]:
        return ()

    def apply(self, weights: Tensor, factors: tuple[Tensor, ...], block: Block, mask: Mask) -> Tensor:
        return weights.masked_fill(block.of_keys(self.head_keys).to(weights.device), 0.0)


@dataclass(frozen=True, eq=False)
class _InEveryLayer(ActiveEdit):
    keys: dict[int, Tensor]

    def lower(self, layer: int, mask: Mask, batch: int) -> Lowered:
        return Lowered(weights=(_WithoutValues(self.keys[layer]),))  # type: ignore[arg-type]


def _shares(record: Record, flags: Tensor) -> Tensor:
    """`share` of the keys in `flags`, [text, layer, head] in float64."""
    found = []
    for place, layer in enumerate(record.layers):
        map, value = record.map(layer), record.values[layer]
        value = value.float().repeat_interleave(map.shape[1] // value.shape[1], 1)
        picked = flags[:, place, :, :, None].to(value)
        ratio = (map @ (value * picked)).double().norm(dim=-1) / (map @ value).double().norm(dim=-1)
        even = (even_map(map) @ picked)[..., 0]
        asked = (even > 0) & (even < 1 - 1e-6)
        found.append(ratio.masked_fill(~asked, torch.nan).nanmean(-1).cpu())
    return torch.stack(found, 1)


def _changes(model: HookedModel, batch: Batch, plain: Tensor, flags: Tensor) -> Tensor:
    """KL and change of the logits of each text without the values of these keys, [text, measure] in float64."""
    edit = _InEveryLayer({layer: flags[:, place] for place, layer in enumerate(model.layers)})
    with model.acting([edit]):
        changed = outputs_of(model)(batch.ids)
    before, after = plain.double(), changed.double()
    moved = after - before
    if _measures(model) == ["similarity_change"]:
        return moved.abs()[:, None].cpu()
    if len(_measures(model)) == 1:
        return moved.square().mean(-1).sqrt().reshape(len(moved), -1).mean(-1, keepdim=True).cpu()
    p, q = before.log_softmax(-1), after.log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1).clamp_min(0)
    moved = (moved - moved.mean(-1, keepdim=True)).square().mean(-1).sqrt()
    return torch.stack([each.reshape(len(each), -1).mean(-1) for each in (kl, moved)], -1).cpu()


def _measures(model: HookedModel) -> list[str]:
    """What is asked of the outputs: of distributions over tokens or classes, of a similarity, else of numbers."""
    if compares(model.hf):
        return ["similarity_change"]
    kind = getattr(model.hf.config, "problem_type", None)
    shares = len(model.classes) > 1 and kind not in ("regression", "multi_label_classification")
    if model.has_lm_head or (shares and not is_span(model.hf, model.classes)):
        return ["kl", "logit_change"]
    return ["output_change"]
