"""Which heads carry an edge: the part of what a source gives to an answer that passes through each head.

Attention weights, the scales of norms and the outputs of MLPs are held at their values in the run. What a source adds
then reaches a later place along paths through heads alone, and is linear in it. At every layer the edge is the sum of
what passes through each of its heads and of what passes by them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from headwater.analyses._catalogue.analysis import analysis
from headwater.analyses._catalogue.settings import BatchSize
from headwater.analyses._measures.measure import AnswerSetting, Explained, PositionSetting, WrongSetting
from headwater.analyses._prompts.examples import Examples
from headwater.analyses._prompts.positions import place_of
from headwater.analyses._prompts.texts import Texts
from headwater.analyses._streams.between_layers import refuse_crossing, refuse_mixers
from headwater.analyses._streams.component_graph import EMBED
from headwater.analyses._streams.frozen_norm import Norm
from headwater.analyses._streams.readout import Readout
from headwater.analyses._streams.writers import Layer, Writers
from headwater.analyses.logits._answer_position import answers_of
from headwater.kernels.maps.attention_map import AttentionMap
from headwater.lens.errors import AnalysisError, nearest
from headwater.lens.model import HookedModel
from headwater.lens.models import blocks, norms
from headwater.lens.models.closeness import close_or_refuse, of_sums, rounding_mend
from headwater.lens.models.weights import head_weights


@analysis
def head_loadings(
    model: HookedModel,
    examples: Examples,
    source: Annotated[str, 'what writes: "embed", an MLP such as "mlp.3", a head such as "2.1"'] = EMBED,
    source_position: Annotated[int | None, "token position at which it writes; none: all"] = None,
    answer: AnswerSetting = None,
    wrong: WrongSetting = None,
    position: PositionSetting = -1,
    batch_size: BatchSize = 16,
) -> xr.Dataset:
    """`loading` [batch, layer, head]: the part of the edge from `source` to the answer's logit that each head carries.

    The edge `total` [batch] is what the source adds to the logit of `answer` (less that of `wrong`) at `position`, with
    attention weights, the scales of all norms and the outputs of MLPs as they are in the run. It is a sum over paths
    through heads. A loading is the sum over the paths that pass through that head, and `bypass` [batch, layer] over
    those which pass its layer in the stream, so that for every layer `loading.sum("head") + bypass` is the total.
    `direct` [batch] is the path through no head (direct_logit_attribution of the source). Layers before the source are
    NaN. A logit with a soft cap is taken before it. AnalysisError where values are no projection of the normed stream.

    Question: Which heads carry what one part of a model gives to an answer?
    Unit: logit (before a soft cap on logits).
    Source: head loadings, Kamath et al. 2025, Tracing Attention Computation Through Feature Interactions, as split in
    circuit-tracer pull request 114; here the sources are parts of the model and not features of transcoders.
    Cost: one forward pass, and per layer two products of its maps forward and one back; memory layers·S·d_model and
    heads·S·d_model, no map.
    Not for: what changes if the head were off: patterns and MLPs would answer (patch, path_patch); sums over layers,
    since one path passes several.

    >>> import headwater as hw
    >>> model = hw.load("tasks-4l")
    >>> prompt = "When Mary and John went to the store , John gave a drink to"
    >>> found = hw.analyses.head_loadings(model, prompt, "embed", 1, answer="Mary", wrong="John")
    >>> bool((abs(found.loading.sum("head") + found.bypass - found.total) < 1e-6).all())
    True
    """
    refuse_mixers(model.name, model.mixers, "head_loadings")
    refuse_crossing(model, "head_loadings")
    explained = Explained(model, None, answer, wrong, position, "logit", of_classes=True)
    texts = Texts.of(model, examples, batch_size)
    count = len(texts.valid)
    loading = torch.full((count, model.n_layers, model.n_heads), torch.nan, dtype=torch.float64)
    bypass = torch.full((count, model.n_layers), torch.nan, dtype=torch.float64)
    total, direct = torch.full((2, count), torch.nan, dtype=torch.float64)
    for batch in texts.batches:
        place_of(position, texts.length(batch), f"example {batch.places[0]}")
        run = Writers.of(model, batch)
        readout = Readout.of(run, position, *answers_of(explained, run, batch))
        begin, written = _written(run, source)
        if source_position is not None:
            place = place_of(source_position, written.shape[1], f"example {batch.places[0]}")
            alone = torch.zeros_like(written)
            alone[:, place] = written[:, place]
            written = alone
        with torch.enable_grad():
            split = _Split.of(run, readout, run.at(position), begin, written)
            total[batch.places], direct[batch.places] = split.total.cpu(), split.direct.cpu()
            for layer, heads, around in split.layers():
                loading[batch.places, model.layers.index(layer)] = heads.cpu()
                bypass[batch.places, model.layers.index(layer)] = around.cpu()
    return xr.Dataset(
        {
            "loading": (("batch", "layer", "head"), loading.numpy()),
            "bypass": (("batch", "layer"), bypass.numpy()),
            "total": ("batch", total.numpy()),
            "direct": ("batch", direct.numpy()),
        },
        coords={"batch": np.arange(count), "layer": model.layers, "head": np.arange(model.n_heads)},
        attrs={"source": source},
    )


@dataclass(frozen=True, eq=False)
class _Split:
    """An edge: what of it entered each layer, `slope` of the answer at the end of the stream."""

    run: Writers
    entered: dict[int, Tensor]
    slope: Tensor
    total: Tensor
    direct: Tensor

    @classmethod
    def of(cls, run: Writers, readout: Readout, places: Tensor, begin: int, written: Tensor) -> _Split:
        """`begin` is the first layer that reads what the source wrote, `written` [batch, position, d_model]."""
        rows = torch.arange(len(written), device=written.device)
        end = torch.zeros_like(written).requires_grad_()
        (slope,) = torch.autograd.grad(readout.shares(end[rows, places]).sum(), end)
        x, entered = written, {}
        for number in (n for n in run.layers if n >= begin):
            entered[number] = x
            with torch.no_grad():
                x = x + _through(run, number, x).sum(1)
        return cls(run, entered, slope, (slope * x).sum((1, 2)), (slope * written).sum((1, 2)))

    def layers(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Layer, loadings [batch, head] and bypass [batch], from the last layer to the first."""
        slope = self.slope
        for layer, entered in reversed(self.entered.items()):
            given = entered.detach().requires_grad_()
            outputs = _through(self.run, layer, given)
            heads = (slope[:, None] * outputs.detach()).sum((2, 3))
            yield layer, heads, (slope * entered).sum((1, 2))
            slope = slope + torch.autograd.grad((outputs * slope[:, None]).sum(), given)[0]


def _written(run: Writers, source: str) -> tuple[int, Tensor]:
    """The first layer that reads the source, and what it writes."""
    found = dict(run.parts())
    if source not in found:
        raise AnalysisError(f"{run.model.name} has no part {source!r} that writes; {nearest(source, found)}")
    home = next((layer for layer, terms in run.terms.items() if source in terms), None)
    return min(run.layers) if home is None else home + 1, found[source]


def _through(run: Writers, number: int, given: Tensor) -> Tensor:
    """What each head of a layer makes of a part of its stream, [batch, head, position, d_model]; linear in it."""
    layer, model = run.layers[number], run.model
    norm, weights = blocks.block(model, number).norm1, head_weights(model, number)
    matrix = weights.W_V.double().to(given.device)
    frozen = None if norm is None else Norm.of(norm, layer.entering)

    def read(x: Tensor) -> Tensor:
        x = x if frozen is None else frozen.divided(x)
        return torch.einsum("bsd,hde->bhse", x, matrix)

    _hold(model, number, layer, read(layer.entering), weights.b_V.double(), matrix)
    heads = layer.map.shape[1]
    value = read(given).repeat_interleave(heads // len(matrix), 1)
    z: Tensor = _Gathered.apply(value, layer.map)  # pyright: ignore[reportAssignmentType]
    z = z if layer.gate is None else z * layer.gate
    outputs = torch.einsum("bhse,hed->bshd", z, layer.output)
    return (outputs if layer.behind is None else layer.behind.divided(outputs)).movedim(2, 1)


class _Gathered(torch.autograd.Function):
    """A map times values in the precision of the values, a block of rows at a time; only the values have a slope."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, map: AttentionMap) -> Tensor:
        ctx.map = map
        return torch.cat([weights.to(value) @ value for _, weights in map.row_blocks()], 2)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> Any:
        (slope,) = slopes
        return sum(weights.to(slope).mT @ slope[:, :, rows] for rows, weights in ctx.map.row_blocks()), None


def _hold(model: HookedModel, number: int, layer: Layer, read: Tensor, bias: Tensor, matrix: Tensor) -> None:
    """AnalysisError unless the values are the projection of the normed stream."""
    norm = blocks.block(model, number).norm1
    constant = bias.to(read)
    if norm is not None:
        shift = norms.norm_bias(norm, matrix.shape[1]).to(read)
        constant = constant + torch.einsum("d,hde->he", shift, matrix)
    what = f"the values of layer {number} of {model.name} are no projection of its normed stream"
    close_or_refuse(read + constant[:, None], layer.value, what, rounding_mend(model), allowed=of_sums(model))
