"""Independent ways for the analyses of sinks and of how widely a head looks: dense weights, plain values and streams.

Each raises LookupError for a model of another make, so that the analysis counts as having run. The first key is the
sink, as in the calls of the matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from headwater.command.matrix_plain import Plain
from headwater.command.matrix_values import block_output, streams, values

Pairs = Iterator[tuple[Any, Any]]
NEAR = 1e-5  # float32 rounds weights: counts at thresholds that are this much apart hold the right one


def row_support(plain: Plain, found: Any) -> Pairs:
    """A count is right if it lies between those of a slightly smaller and of a slightly larger threshold."""
    for layer, dense in enumerate(plain.weights):
        size = dense.double().abs()
        total = size.sum(-1)
        held = size.sort(-1, descending=True).values.cumsum(-1) / total[..., None]
        seen = torch.ones_like(size).sum(-1) if _pictures(plain) else (size > 0).sum(-1)
        bounds = {
            "support": [1 + (held < 0.99 + step).sum(-1) for step in (-NEAR, NEAR)],
            "above": [(size > 0.01 + step).sum(-1) / seen for step in (NEAR, -NEAR)],
        }
        for name, (low, high) in bounds.items():
            ours = np.nan_to_num(np.asarray(found[name][:, layer]))
            expected = np.clip(ours, low.double().numpy(), high.double().numpy())
            yield found[name][:, layer], np.where(total.numpy() > 0, expected, np.nan)


def value_variance(plain: Plain, found: Any) -> Pairs:
    for layer, dense in enumerate(plain.weights_of_examples):
        v = values(plain, layer).double()
        seen = torch.ones_like(dense) if _pictures(plain) else (dense > 0).to(dense)
        even = seen.double() / seen.sum(-1, keepdim=True)
        for name, vectors in (("output", dense.double() @ v), ("value", v), ("even", even @ v)):
            spread = vectors.var(-1, unbiased=False)
            yield found[name][:, layer], spread
            yield found.gap.sel(of=name)[:, layer], spread[..., 0] / spread[..., 1:].mean(-1)


def dormant_heads(plain: Plain, found: Any) -> Pairs:
    for layer, dense in enumerate(plain.weights_of_examples):
        asked = (dense[..., 1:] > 0).any(-1)
        weight = dense[..., 0].double().masked_fill(~asked, np.nan).nanmean(-1)
        length = (dense.double() @ values(plain, layer).double()).norm(dim=-1).masked_fill(~asked, np.nan)
        length = length.nanmean(-1)
        yield found.on_sinks[:, layer], weight
        yield found.relative[:, layer], length / length.mean(-1, keepdim=True)


def gradient_sinks(plain: Plain, found: Any) -> Pairs:
    """Slopes of the loss at the weights that the eager model gives out, which are those that it multiplies by."""
    ids = plain.subject.examples
    if plain.subject.model.part_name != "text":
        raise LookupError("the weights of several parts")
    out = plain.hf(**plain.inputs(ids), output_attentions=True)
    weights = [each for each in out.attentions or () if each is not None and each.requires_grad]
    if len(weights) != len(plain.attention):
        raise LookupError("weights that are not given out")
    logits = out.logits if plain.writes else None
    if logits is None:
        raise LookupError("another output")
    slopes = torch.autograd.grad(plain.loss(logits, ids).sum(), weights, allow_unused=True)
    if any(slope is None for slope in slopes):
        raise LookupError("weights that are given out are copies")
    for layer, (dense, slope) in enumerate(zip(weights, slopes, strict=True)):
        dense, slope = dense.detach(), slope.masked_fill(dense == 0, 0.0)
        yield found.mass[:, layer], slope.abs().sum(-2)
        yield found.by_weight[:, layer], (dense * slope.abs()).sum(-2)
        yield found.signed[:, layer], (dense * slope).sum(-2)


def states(plain: Plain) -> Tensor:
    """The stream in front of every layer and behind the last, float64 [batch, state, position, d]."""
    model = plain.subject.model
    if model.n_layers < len(model.stack):
        raise LookupError("layers without attention")
    entering = streams(plain)
    last = plain.hf.get_submodule(plain.paths[-1].rpartition(".")[0])
    return torch.stack([*entering, block_output(plain, last)], 1).double()


def activation_spikes(plain: Plain, found: Any) -> Pairs:
    size = states(plain).abs()
    channels = size.amax(2)
    yield found.ratio, channels.amax(-1) / torch.from_numpy(np.median(channels.numpy(), -1))
    yield found["size"], channels.amax(-1)
    for text, each in enumerate(size):
        token, channel = divmod(int(each.amax(0).argmax()), each.shape[-1])
        yield found.spike[text], each[:, token, channel]


def secondary_sinks(plain: Plain, found: Any) -> Pairs:
    stream = states(plain)
    norm = stream.norm(dim=-1)
    first = norm[..., :3].mean(1).argmax(-1)
    for text, place in enumerate(first.tolist()):
        yield found.norm[text], norm[text, :, place]
        cosine = torch.cosine_similarity(stream[text], stream[text, :, place, None], dim=-1)
        yield found.cosine[text], cosine.abs()
        change = norm[text, :, place].diff()
        inside = slice(int(change.argmax()) + 1, int(change.argmin()) + 1)
        yield found.lifetime[text], (cosine.abs()[inside] > 0.9).sum(0)


def _pictures(plain: Plain) -> bool:
    return plain.subject.model.part_name == "vision"


SINK_WAYS: dict[str, Callable[[Plain, Any], Pairs]] = {
    each.__name__: each
    for each in (
        row_support,
        value_variance,
        dormant_heads,
        gradient_sinks,
        activation_spikes,
        secondary_sinks,
    )
}
