"""Secondary sinks: tokens that turn into the first token's direction in some layer, and how long they stay so.

A sink that is not there from the start: an MLP of a middle layer moves a token's stream into the direction that the
first token has, and a later block moves it back. Wong et al. 2025 (arXiv 2512.22213) name the layer where it begins and
the number of layers that it lasts its level. The stream says where a sink could be; how much attention the token gets
is another question, which `find_sinks` answers.
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from headwater.analyses._catalogue.analysis import analysis
from headwater.analyses._catalogue.settings import Bounds
from headwater.analyses.sinks._streams import norms_of, states, stream_of
from headwater.lens.errors import AnalysisError
from headwater.lens.records.record import Record

FIRST = 3  # tokens among which the one with the largest stream is the primary sink
MARGIN = 15  # layers fewer than the model's that a token like the primary sink lasts
KINDS = ("none", "noise", "secondary", "primary")


@analysis(keep=("qk", "residual"))
def secondary_sinks(
    record: Record,
    similarity: Annotated[float, "cosine above which a token is a sink", Bounds(0.0, 1.0)] = 0.9,
    shortest: Annotated[int, "a secondary sink lasts more layers than this", Bounds(0)] = 4,
    lasting: Annotated[
        int | None,
        "layers from which a token is like the primary sink; none: 15 fewer than there are",
        Bounds(1),
    ] = None,
    first_layer: Annotated[int | None, "where to begin; none: behind the largest rise", Bounds(0)] = None,
    last_layer: Annotated[int | None, "where to end; none: before the largest fall", Bounds(0)] = None,
) -> xr.Dataset:
    """A token i is a sink at layer l if `|cos(x_i, x_p)| > similarity`; x is the stream, p the primary sink.

    p is the one of a text's first three tokens whose stream has the largest mean norm over the layers. Layers count
    from behind the block that raises `‖x_p‖` most to before the block that lowers it most: `first` and `last`
    [batch]. There are none where the fall comes before the rise. A layer means the stream that enters it; the number
    behind the last layer's is the stream that leaves it.

    Dataset: `cosine` [batch, layer, key], the absolute cosine; `norm` [batch, layer], that of p; `primary` [batch], the
    column of p; `lifetime` [batch, key], the number of those layers at which the token is a sink; `created`, the first
    of them (-1: none); `kind`: "primary" from `lasting` layers on and p itself, "secondary" above `shortest`, "noise"
    below, else "none". `level_created`, `level_lifetime`, `level_count` [level] list the levels of the secondary sinks
    over all texts. Without `lasting` it is the number of layers less 15, or half of them where that is not above
    `shortest`. Padding has NaN and no kind. AnalysisError unless the record keeps "residual".

    Question: Which tokens become sinks in later layers, and for how long?
    Unit: layers; absolute cosine, 0 to 1; l2 norm.
    Source: arXiv:2512.22213; the thresholds are its own, the rule for models below 20 layers is ours.
    Cost: one product of the stream with one vector per layer, memory O(layers·S).
    Not for: how much attention a token gets (find_sinks); models whose first token's stream does not rise and fall.

    >>> import headwater as hw
    >>> model = hw.load("tasks-4l")
    >>> record = model.record("When Mary and John went to the store", keep=("qk", "residual"))
    >>> found = hw.analyses.secondary_sinks(record, shortest=0, lasting=3, first_layer=1, last_layer=4)
    >>> found.kind.values[0, 0].item(), found.lifetime.dims
    ('primary', ('batch', 'key'))
    """
    places, layers = states(record)
    for name, layer in (("first_layer", first_layer), ("last_layer", last_layer)):
        if layer is not None and layer not in layers:
            raise AnalysisError(
                f"{name}={layer} is not in the record; its streams are {', '.join(map(str, layers))}"
            )
    sizes = norms_of(record)  # [batch, layer, position]
    primary = _primary(record.valid, sizes)
    rows = torch.arange(len(primary))
    size = sizes[rows, :, primary]  # [batch, layer]
    first, last = _band(size, layers, first_layer, last_layer)
    cosine = _cosines(record, places, primary)
    number = torch.tensor(layers)
    inside = (number >= first[:, None]) & (number <= last[:, None])
    sink = (cosine > similarity) & inside[..., None]
    lifetime = sink.sum(1)
    created = torch.where(lifetime > 0, number[sink.long().argmax(1)], -1)
    depth = len(record.layers)
    if lasting is None:
        lasting = depth - MARGIN if depth - MARGIN > shortest else max(-(-depth // 2), 1)
    kind = (lifetime > 0).long() + (lifetime > shortest).long()
    kind[lifetime >= lasting] = 3
    kind[rows, primary] = 3
    kind[~record.valid] = 0
    secondary = kind == 2
    levels = torch.stack([created[secondary], lifetime[secondary]], 1)
    levels, counts = torch.unique(levels, dim=0, return_counts=True)
    strings = np.array(record.strings, dtype=object).astype(str)
    return xr.Dataset(
        {
            "cosine": (("batch", "layer", "key"), cosine.numpy()),
            "norm": (("batch", "layer"), size.numpy()),
            "primary": ("batch", primary.numpy()),
            "first": ("batch", first.numpy()),
            "last": ("batch", last.numpy()),
            "lifetime": (("batch", "key"), lifetime.numpy()),
            "created": (("batch", "key"), created.numpy()),
            "kind": (("batch", "key"), np.array(KINDS)[kind.numpy()]),
            "level_created": ("level", levels[:, 0].numpy()),
            "level_lifetime": ("level", levels[:, 1].numpy()),
            "level_count": ("level", counts.numpy()),
        },
        coords={"layer": layers, "token": (("batch", "key"), strings)},
        attrs={"lasting": lasting},
    )


def _primary(valid: Tensor, sizes: Tensor) -> Tensor:
    """The column of the primary sink of each text, from the norms [batch, layer, position]."""
    early = valid & (valid.cumsum(1) <= FIRST)
    return sizes.mean(1).masked_fill(~early, -torch.inf).argmax(1)


def _band(size: Tensor, layers: list[int], first: int | None, last: int | None) -> tuple[Tensor, Tensor]:
    """The first and the last layer that count, [batch] each; `size` [batch, layer] is the norm of the primary sink."""
    number, change = torch.tensor(layers), size.diff(dim=1)
    begin, end = number[change.argmax(1) + 1], number[change.argmin(1)]
    given = [begin if first is None else torch.full_like(begin, first)]
    given.append(end if last is None else torch.full_like(end, last))
    return given[0], given[1]


def _cosines(record: Record, places: list[int | str], primary: Tensor) -> Tensor:
    """|cos| of every token's stream with the primary sink's, [batch, layer, position] in float64; NaN for padding."""
    rows, found = torch.arange(len(primary)), []
    for place in places:
        unit = torch.nn.functional.normalize(stream_of(record, place), dim=-1)
        found.append((unit * unit[rows, primary][:, None]).sum(-1).abs())
    return torch.stack(found, 1).masked_fill(~record.valid[:, None], torch.nan)
