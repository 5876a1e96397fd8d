"""Attention rollout: how much of each input token reaches a chosen position if attention alone moved information.

Abnar & Zuidema 2020 (arXiv 2005.00928). The asked rows are pulled down through the transposed maps, layer by layer. For
asked columns, the shares of those input tokens go up, as if they were values. Memory is linear in the length either
way; only heads="max"/"min" read all maps in blocks of rows. Values, output projections and MLPs are left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated

import torch
import xarray as xr
from torch import Tensor

from headwater.analyses._catalogue.analysis import analysis
from headwater.analyses._catalogue.settings import Bounds
from headwater.analyses._prompts.positions import Positions, columns_of, position_coordinates
from headwater.analyses.tokens._layer_map import (
    Joining,
    Mixers,
    Reduction,
    attributes,
    joined_rows,
    over_row_sums,
)
from headwater.analyses.tokens._sinks_aside import WithoutSetting
from headwater.kernels.maps.attention_map import AttentionMap
from headwater.lens.records.record import Record

CHUNK = 64  # columns per pass: about the width of a head, so that a pass costs one attention call


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
    joining = Joining.of(record, residual, heads, add_residual, last_layer, mixers, without)
    columns = columns_of(queries, record.valid, "queries")
    followed = None if keys is None else columns_of(keys, record.valid, "keys")
    if followed is None:
        shares = _downward(record, joining, columns)
    else:
        shares = _upward(record, joining, followed)
        shares = shares.gather(1, columns[..., None].expand(-1, -1, followed.shape[1]))
        shares = shares.masked_fill(~record.valid.gather(1, followed)[:, None], torch.nan)
    shares = shares.masked_fill(~record.valid.gather(1, columns)[..., None], torch.nan)
    return xr.DataArray(
        shares.numpy(),
        dims=("batch", "query", "key"),
        coords=position_coordinates(record, queries, columns, "all" if keys is None else keys, followed),
        name="rollout",
        attrs=attributes(record, joining) | joining.one_token(record, shares.numpy(), columns, followed),
    )


def _downward(record: Record, joining: Joining, columns: Tensor) -> Tensor:
    """Rows of R, [batch, asked, position], from the last layer to the first: one transposed pass per layer."""
    rows = _indicators(columns, record.valid.shape[1])
    for depth, layer in reversed(list(enumerate(joining.layers))):
        mixing = joining.mixing[depth]
        if isinstance(mixing, str):
            rows = _pull_rows(joined_rows(record, joining, depth), rows, joining.weight)
        else:
            mass = _row_mass(record, layer, mixing, joining.kept)
            rows = _pull(record.map(layer), mass, rows, joining.weight, mixing, joining.kept)
    return rows.mT.masked_fill(rows.isnan().any(1)[..., None], torch.nan)


def _upward(record: Record, joining: Joining, columns: Tensor) -> Tensor:
    """Columns of R, [batch, position, asked], from the first layer to the last: attention to shares in the place of
    values.

    One more column carries the share that comes from rows without any weight, which makes a result undefined.
    """
    shares = torch.nn.functional.pad(_indicators(columns, record.valid.shape[1]), (0, 1))
    weight = joining.weight
    for depth, layer in enumerate(joining.layers):
        mixing = joining.mixing[depth]
        if isinstance(mixing, str):
            moved, mass = _push_rows(joined_rows(record, joining, depth), shares)
        else:
            seen = shares if joining.kept is None else shares * joining.kept[..., None]
            moved = _push(record.map(layer), seen, mixing)
            mass = _row_mass(record, layer, mixing, joining.kept)
        total = ((1 - weight) * mass + weight)[..., None]
        shares = (weight * shares + (1 - weight) * moved) / torch.where(total > 0, total, 1.0)
        shares[..., -1:].masked_fill_(total == 0, 1.0)
    return shares[..., :-1].masked_fill(shares[..., -1:] > 0, torch.nan)


def _indicators(columns: Tensor, length: int) -> Tensor:
    """One column per asked position, 1 there and 0 elsewhere: [batch, position, asked]."""
    rows = torch.zeros(*columns.shape, length).scatter_(2, columns[..., None], 1.0)
    return rows.mT.contiguous()


def _row_mass(record: Record, layer: int, mixing: Tensor, kept: Tensor | None) -> Tensor:
    """The row sums of Ā over the keys that count, [batch, query]: summed, not 1 less the sinks, which would cancel."""
    if kept is not None:
        return _push(record.map(layer), kept[..., None], mixing)[..., 0]
    mass = torch.from_numpy(record.statistic("row_mass").sel(layer=layer).values)
    return torch.einsum("h,bhq->bq", mixing, mass.nan_to_num())


def _push(map: AttentionMap, shares: Tensor, mixing: Tensor) -> Tensor:
    """`Ā @ shares` of one layer, [batch, query, asked]."""
    moved = [
        torch.einsum("h,bhqt->bqt", mixing, (map @ chunk.contiguous()).float().cpu())
        for chunk in shares.split(CHUNK, dim=2)
    ]
    return torch.cat(moved, dim=2)


def _push_rows(blocks: Iterable[tuple[slice, Tensor]], shares: Tensor) -> tuple[Tensor, Tensor]:
    """`_push` for a layer that is read in blocks of rows, and the row sums [batch, query]."""
    moved, mass = torch.zeros_like(shares), torch.zeros(shares.shape[:2])
    for span, merged in blocks:
        merged = merged.float()
        moved[:, span], mass[:, span] = merged @ shares, merged.sum(-1)
    return moved, mass


def _pull(
    map: AttentionMap, mass: Tensor, rows: Tensor, weight: float, mixing: Tensor, kept: Tensor | None
) -> Tensor:
    """One layer down, `Ãᵀ @ rows` for rows [batch, position, asked]; `mass` [batch, query], `mixing` [head]."""
    rows = over_row_sums(rows, mass, weight)
    parts = [
        torch.einsum("h,bhkt->bkt", mixing, (map.T @ chunk.contiguous()).float().cpu())
        for chunk in rows.split(CHUNK, dim=2)
    ]
    moved = torch.cat(parts, dim=2)
    return weight * rows + (1 - weight) * (moved if kept is None else moved * kept[..., None])


def _pull_rows(blocks: Iterable[tuple[slice, Tensor]], rows: Tensor, weight: float) -> Tensor:
    """`_pull` for a layer that is read in blocks of rows: a maximum over heads is not linear, nor are shares."""
    out = torch.zeros_like(rows)
    for span, merged in blocks:
        merged = merged.float()  # [batch, query, key]
        block = over_row_sums(rows[:, span], merged.sum(-1), weight)
        out += (1 - weight) * torch.einsum("bqk,bqt->bkt", merged, block)
        out[:, span] += weight * block
    return out
