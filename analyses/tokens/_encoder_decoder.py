"""Relevance through encoder, decoder and cross-attention: the rules of Chefer, Gur & Wolf 2021 for two streams.

With s for the decoder's tokens and q for the encoder's, only the asked rows of `R_ss` and `R_sq` are computed. These
rows are pulled down to every cross-attention. The factors on both sides of it, `rownorm(R - I)`, are applied to vectors
that go up through the layers of their own side. So no queries × keys matrix exists on either side, and each layer is
multiplied out twice. Only texts with equal lengths on both sides run together, so that nothing is padded.
"""

from __future__ import annotations

import contextlib

import torch
import xarray as xr
from torch import Tensor

from headwater.analyses._inputs.inputs import Inputs
from headwater.analyses._measures.measure import Explained
from headwater.analyses._prompts.examples import Batch, differentiable, outputs_of
from headwater.analyses._prompts.positions import Positions, place_of
from headwater.analyses._prompts.texts import indicators
from headwater.analyses.tokens._gradients import Rooted, WeightSlopes, slopes_at
from headwater.kernels.maps.attention_map import AttentionMap
from headwater.lens.attention import context
from headwater.lens.errors import AnalysisError
from headwater.lens.model import HookedModel
from headwater.lens.running.watching import Heads

Step = tuple[bool, WeightSlopes]  # whether it crosses, in the order the model runs the decoder's layers


def relevance_of_pairs(asked: Explained, inputs: Inputs, queries: Positions | None) -> xr.DataArray:
    """Rows of `R_sq` and `R_ss` side by side, [batch, query, key]: the encoder's tokens, then the decoder's.

    None is the row of the position that is asked about.
    """
    source, target = inputs.texts
    if queries is None:
        looks = inputs.sides[-1]
        if looks.part_name != next(iter(looks.parts)):
            raise AnalysisError(
                f"the outputs of {looks.name} are of its {next(iter(looks.parts))}, not of the {looks.part_name}; name "
                "the rows to read out, e.g. queries=[0]"
            )
        for batch in inputs.batches:
            place_of(asked.position, target.length(batch), f"example {batch.places[0]}")
        queries = [asked.position]
    columns = target.columns(queries)
    own, across = target.empty(columns.shape[1]), source.empty(columns.shape[1])
    for batch in inputs.batches:
        encoder, steps = _slopes(asked, inputs.sides, batch)
        rows = indicators(*target.rows(batch, columns), target.length(batch))
        mine, others = _rows(encoder, steps, rows)
        target.spread(batch, mine, own)
        source.spread(batch, others, across)
    return inputs.by_query([across, own], queries, columns, "relevance")


def _rows(encoder: list[WeightSlopes], steps: list[Step], rows: Tensor) -> tuple[Tensor, Tensor]:
    """`rows @ R_ss` and `rows @ R_sq` for rows [batch, asked, token of the decoder]."""
    rows = rows.to(steps[0][1].slope.device)
    to_cross = []  # rows · Π (I + Ā) over the decoder's layers above each cross-attention, the top one first
    for crosses, own in reversed(steps):
        if crosses:
            to_cross.append(rows.mT)
        else:
            rows = rows + own.pulled(rows)
    carried = torch.cat([*reversed(to_cross), torch.ones_like(rows[:, :1]).mT], -1)
    gained = torch.zeros_like(carried)  # (R_ss - I) · carried; its last column is the row sums of R_ss - I
    width, across = rows.shape[1], []  # across: rows · R_sq before the encoder, by cross-attention
    for crosses, own in steps:
        if not crosses:
            gained = gained + own.pushed(carried + gained)
            continue
        mine = slice(len(across) * width, (len(across) + 1) * width)
        turned = _shared(gained[..., mine], gained[..., -1:]) + carried[..., mine]
        across.append(own.pulled(turned.mT))
    return rows, _through_encoder(encoder, torch.stack(across).sum(0))


def _through_encoder(encoder: list[WeightSlopes], rows: Tensor) -> Tensor:
    """`rows @ (rownorm(R_qq - I) + I)` for rows [batch, asked, token of the encoder]."""
    ones = torch.ones_like(rows[:, :1]).mT
    sums = torch.zeros_like(ones)
    for own in encoder:
        sums = sums + own.pushed(ones + sums)
    shares = _shared(rows, sums.mT)
    gained = torch.zeros_like(rows)
    for own in reversed(encoder):
        gained = gained + own.pulled(shares + gained)
    return gained + rows


def _shared(parts: Tensor, whole: Tensor) -> Tensor:
    """parts / whole; 0 where the whole is 0, NaN where a part is NaN."""
    return torch.where(whole > 0, parts / whole, parts * 0)


class _Kept(Heads):
    """Records the layers of one part as they run; `order` lists the layers of all parts in the order of the run."""

    def __init__(self, view: HookedModel, order: list[tuple[_Kept, int]]) -> None:
        super().__init__(view)
        self.view, self.order = view, order

    def take(self, layer: int, map: AttentionMap, value: Tensor, output: Tensor) -> None:
        super().take(layer, map, value, output)
        self.order.append((self, layer))


def _slopes(
    asked: Explained, sides: list[HookedModel], batch: Batch
) -> tuple[list[WeightSlopes], list[Step]]:
    """Slopes of the encoder's layers, and of the decoder's and cross-attention's in the order of the run."""
    model = asked.model
    value = asked.of(batch)
    order: list[tuple[_Kept, int]] = []
    views = [_Kept(view, order) for view in (*sides, model.part("cross"))]
    with contextlib.ExitStack() as stack:
        for kept in views:
            stack.enter_context(context.listening(kept))
            stack.enter_context(context.tapping(kept.view.key, Rooted()))
        found = value(outputs_of(model)(batch.ids, grad=True), torch.arange(len(batch.places)))
    heads = [kept.layers[layer] for kept, layer in order]
    found = differentiable(found, "the measure")
    grads = torch.autograd.grad(found.sum(), [output for *_, output in heads], allow_unused=True)
    encoder, steps = [], []
    for (kept, layer), mine, grad in zip(order, heads, grads, strict=True):
        slopes = slopes_at(kept.view, layer, mine, grad)
        if kept.view.part_name == sides[0].part_name:
            encoder.append(slopes)
        else:
            steps.append((kept.view.part_name == "cross", slopes))
    return encoder, steps
