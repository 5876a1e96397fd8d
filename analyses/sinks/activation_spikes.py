"""Activation spikes: single channels of the stream that are far larger than all others, layer by layer.

Massive activations rise in one block, stay for most layers and fall in one of the last (Sun et al. 2024). They and
attention sinks often come together, and are not the same thing: with another norm a model has one without the other
(arXiv 2603.05498).
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from headwater.analyses._catalogue.analysis import analysis
from headwater.analyses._catalogue.settings import Bounds
from headwater.analyses.sinks._streams import states, stream_of
from headwater.lens.records.record import Record

MASSIVE, TIMES_MEDIAN = 100.0, 1000.0  # Sun et al. 2024: what makes an activation massive
SMALL = 0.1  # root mean squares below which a channel is called near zero


@analysis(keep=("qk", "residual"))
def activation_spikes(
    record: Record,
    above: Annotated[float, "medians above which a channel is counted", Bounds(0.0)] = 100.0,
) -> xr.Dataset:
    """`ratio` [batch, layer] is `max_c m_c / median_c m_c` of a text, with `m_c = max_i |x_ic|` the size of channel c.

    x is the stream that enters the layer; the number behind the last layer's is the stream that leaves it. `channels`
    [batch, layer] counts channels with `m_c > above · median m`. `massive` [batch, layer] counts the activations that
    Sun et al. call massive: `|x_ic| > 100` and at least 1,000 times the median of all |x| of the text and layer.
    `size`, `channel`, `position` [batch, layer]: the largest |x_ic| and where it is. `near_zero` [batch, layer]: the
    share of channels of that token below 0.1 after division by their root mean square.

    `spike` [batch, layer] follows the activation (i, c) that is largest over all layers: |x_ic|. `rise` [batch] is the
    layer whose block raises it most and `fall` the one that lowers it most; `plateau` [batch] counts the layers at
    which it is above half of its largest size. `spike_channel` and `spike_position` [batch] name it. Positions are
    columns of the record. AnalysisError unless the record keeps "residual".

    Question: Where do single channels of the stream become huge, and which block makes them so?
    Unit: size of an activation; multiples of the median channel; layers.
    Source: Sun et al. 2024, arXiv:2402.17762 (its thresholds from memory); arXiv:2603.05498 (rise, plateau and fall);
    the half of the plateau and the 0.1 of `near_zero` are ours.
    Cost: one pass over the streams, memory O(S·d_model).
    Not for: saying that a spike matters: take it out of the stream and look (docs/real-models.md does).

    >>> import headwater as hw
    >>> model = hw.load("tasks-4l")
    >>> record = model.record("When Mary and John went to the store", keep=("qk", "residual"))
    >>> found = hw.analyses.activation_spikes(record)
    >>> found.ratio.shape, bool((found.ratio >= 1).all()), found.massive.max().item()
    ((1, 5), True, 0)
    """
    places, layers = states(record)
    valid = record.valid.cpu()
    names = ("ratio", "channels", "massive", "size", "channel", "position", "near_zero")
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    for place in places:
        rows = [
            _spread(x[real], real, above) for x, real in zip(stream_of(record, place), valid, strict=True)
        ]
        for name, values in zip(names, zip(*rows, strict=True), strict=True):
            found[name].append(torch.stack(values))
    stacked = {name: torch.stack(values, 1) for name, values in found.items()}
    top = stacked["size"].argmax(1)
    text = torch.arange(len(valid))
    where = stacked["position"][text, top], stacked["channel"][text, top]
    spike = torch.stack([stream_of(record, place)[text, *where].abs() for place in places], 1)
    change, number = spike.diff(dim=1), torch.tensor(layers)
    more = {
        "rise": number[change.argmax(1)],
        "fall": number[change.argmin(1)],
        "plateau": (spike > spike.amax(1, keepdim=True) / 2).sum(1),
        "spike_position": where[0],
        "spike_channel": where[1],
    }
    return xr.Dataset(
        {name: (("batch", "layer"), values.numpy()) for name, values in (stacked | {"spike": spike}).items()}
        | {name: ("batch", values.numpy()) for name, values in more.items()},
        coords={"layer": layers, "batch": np.arange(len(valid))},
    )


def _spread(x: Tensor, real: Tensor, above: float) -> tuple[Tensor, ...]:
    """The measures of one text and layer, from the stream [token, d_model] of its real tokens."""
    size = x.abs()
    channels, median = size.amax(0), _median(size.flatten())
    middle = _median(channels)
    place = int(size.argmax())
    token, channel = divmod(place, x.shape[1])
    relative = size[token] / x[token].square().mean().sqrt()
    return (
        channels.max() / middle,
        (channels > above * middle).sum(),
        ((size > MASSIVE) & (size >= TIMES_MEDIAN * median)).sum(),
        size.max(),
        torch.tensor(channel),
        real.nonzero()[token, 0],
        (relative < SMALL).double().mean(),
    )


def _median(values: Tensor) -> Tensor:
    """The median; of an even number of values the mean of the middle two."""
    return torch.as_tensor(np.median(values.numpy()))  # torch.quantile takes no more than 2**24 values
