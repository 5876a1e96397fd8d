"""Attention rollout: how much of each input token reaches a chosen position if attention alone moved information.

Abnar & Zuidema 2020 (arXiv 2005.00928). The asked rows are pulled down through the transposed maps, layer by layer. For
asked columns, the shares of those input tokens go up, as if they were values. Memory is linear in the length either
way; only heads="max"/"min" read all maps in blocks of rows. Values, output projections and MLPs are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
import xarray as xr
from torch import Tensor

from headwater.analyses._catalogue.analysis import analysis
from headwater.analyses._catalogue.settings import Bounds
from headwater.analyses._prompts.positions import Positions, columns_of
from headwater.analyses.tokens._layer_map import Mixers, Reduction
from headwater.analyses.tokens._map_steps import Steps
from headwater.analyses.tokens._sinks_aside import WithoutSetting
from headwater.lens.records.record import Record


@analysis(maps="square")
def rollout(
    record: Record,
    queries: Annotated[Positions, 'positions to explain, e.g. -1; "all" for every one'] = (-1,),
    residual: Annotated[float, "weight of the residual stream against attention", Bounds(0.0, 1.0)] = 0.5,
    heads: Annotated[
        Reduction | Sequence[Sequence[float]], "how the heads of a layer become one map"
    ] = "mean",
    add_residual: Annotated[bool, "mix in the residual stream at all"] = True,
    last_layer: Annotated[
        int | None, "last layer of the product; none: the last one recorded", Bounds(0)
    ] = None,
    keys: Annotated[
        Positions | None, "input tokens to follow upward; none: all, from the queries down"
    ] = None,
    mixers: Annotated[
        Mixers, "layers without attention: refused, or followed by their exact maps"
    ] = "refuse",
    without: WithoutSetting = None,
) -> xr.DataArray:
    """Rows `R[i, :]` of `R = Ã_L ··· Ã_1` with `Ã_l = rownorm((1 - w)·Ā_l + w·I)`, as [batch, query, key].

    `Ā_l` is the mean over heads, the largest or smallest weight of each entry, or the mean with given weights [layer,
    head], which are divided by their sum. `w` is `residual`; `add_residual=False` takes `rownorm(Ā_l)`. With rows that
    sum to 1 and w = 0.5 this is the paper's `0.5·Ā + 0.5·I`. A row without weight (every key blocked) keeps its own
    position if there is a residual; without one, every result that passes through it is undefined and NaN.

    With `keys`, columns `R[:, j]` of those input tokens are pushed upward, so that all queries together cost one pass.
    The result holds the asked keys alone, and its rows sum to the share that comes from them.

    Layers that mix positions without attention are refused. With `mixers="effective"`, on a record made with
    keep=("qk", "mixers"), `Ā_l` of such a layer is the mean over heads (or channels) of `|A_ij| / Σ_j |A_ij|` of its
    exact map A, after Ali et al. 2024 (arXiv 2403.01590), whatever `heads` says. That is not for signs, which the
    absolute values drop; for what the layer's short convolution carries, which comes before A; or for the size of
    what is moved.

    A decoder with cross-attention is followed with what it looks at. Keys are the tokens of the source (the encoder's,
    or a picture's), then its own; `key_part` says which, and with `keys` positions count through both. A layer of
    cross-attention is `own' = rownorm([(1 - w)·Ā, w·I]) · [source; own]`, so that R is the product of the layers'
    matrices over the tokens of both sides, with the source's own layers below. The source counts as input where its
    stack is not in the record.

    A record that does not begin at layer 0 gives shares of the residual stream that enters its first layer.

    `without="sinks"` takes the mass on attention sinks out of every layer: `Ã_l = rownorm((1 - w)·Ā_l·D + w·I)` with D
    diagonal, 0 at sinks and 1 elsewhere. Sinks are the tokens whose received share (`find_sinks`), in the mean over
    the heads and layers that are followed, is above 0.3. Attention to a sink then counts as no movement, and a head
    weighs by what it puts elsewhere. A row whose whole mass was on sinks keeps its own position, and so does the
    sink's own row where it sees itself alone; with `add_residual=False` both are undefined and NaN. The result is no
    longer a product of the attention that the model ran, and it says nothing of what a sink carries. In a causal model
    each layer still passes shares to earlier tokens alone, so through many layers the first token that is left gathers
    them. The attribute `set_aside` names the sinks.

    Where one token holds more than 0.9 of every answer that is not its own, the attribute `one_token` says so.

    Question: From which input tokens does a position draw, if attention alone carried information?
    Unit: share of the position, each row sums to 1.
    Source: Abnar & Zuidema 2020, arXiv:2005.00928; held to the authors' code.
    Cost: an attention pass per layer and 64 queries (or keys), memory O(S·those); max, min, effective: all rows once.
    Not for: what the model uses: it knows neither values nor MLPs, and favours early tokens in causal models.

    >>> import headwater as hw
    >>> model = hw.load("tasks-4l")
    >>> record = model.record("When Mary and John went to the store , John gave a drink to")
    >>> found = hw.analyses.rollout(record)  # queries=(-1,): the last token
    >>> found.key_token.values[0, found[0, 0].values.argmax()].item(), float(found.sum().round(1))
    ('Mary', 1.0)
    """
    steps = Steps.of(record, residual, heads, add_residual, last_layer, mixers, without)
    columns = columns_of(queries, record.valid, "queries")
    followed = None if keys is None else columns_of(keys, steps.valid, "keys")
    if followed is None:
        shares = steps.pull(_indicators(columns, record.valid.shape[1]))
    else:
        shares = steps.push(_indicators(followed, steps.valid.shape[1]))
        shares = shares.gather(1, columns[..., None].expand(-1, -1, followed.shape[1]))
        shares = shares.masked_fill(~steps.valid.gather(1, followed)[:, None], torch.nan)
    shares = shares.masked_fill(~record.valid.gather(1, columns)[..., None], torch.nan)
    return xr.DataArray(
        shares.numpy(),
        dims=("batch", "query", "key"),
        coords=steps.coordinates(queries, columns, "all" if keys is None else keys, followed),
        name="rollout",
        attrs=steps.told | steps.one_token(shares.numpy(), columns, followed),
    )


def _indicators(columns: Tensor, length: int) -> Tensor:
    """One column per asked position, 1 there and 0 elsewhere: [batch, position, asked]."""
    rows = torch.zeros(*columns.shape, length).scatter_(2, columns[..., None], 1.0)
    return rows.mT.contiguous()
