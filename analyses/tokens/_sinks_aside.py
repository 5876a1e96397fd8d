"""Sinks set aside in a product of maps, and what a result says where one token holds nearly all of it.

A sink here is a token of a text, for all layers and heads: its received share (`lens/records/sinks.py`), in the mean
over the heads and layers that are followed, is above 0.3.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Literal

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from headwater.analyses._prompts.positions import Labelled
from headwater.lens.records import sinks as rules
from headwater.lens.records.record import Record

Without = Literal["sinks"] | None
WithoutSetting = Annotated[Without, "take the attention to sinks out of every layer; none: leave it in"]
NEARLY_ALL = 0.9  # of an answer
TOLD = 3  # texts whose tokens a message names


def kept_keys(record: Record, layers: Sequence[int]) -> Tensor:
    """1 for the keys that count and 0 for sinks, float32 [batch, key]."""
    return (~sinks_of(record, layers)).float()


def set_aside(record: Record, kept: Tensor) -> str:
    """Which sinks of each text are set aside, as an attribute of a result says it."""
    columns = [row.nonzero()[:, 0].tolist() for row in kept == 0]
    if not any(columns):
        return f"no token: none receives more than {rules.SHARE} of the attention of those that see it"
    return _named(record.key_axis, columns)


def one_token(
    texts: Labelled, causal: bool, shares: np.ndarray, columns: Tensor, keys: Tensor | None = None,
    kept: Tensor | None = None, sinks: Callable[[], Tensor] | None = None,
) -> dict[str, str]:  # fmt: skip
    """{"one_token": what to know} where in each text one token holds more than 0.9 of every answer that is not its own.

    `shares` [batch, query, key] are of the queries in `columns` and the keys in `keys` [batch, asked], None: all.
    `kept` is what `kept_keys` gave, None where all keys count; `sinks` gives the sinks [batch, key] where they can be
    set aside.
    """
    found = torch.from_numpy(shares)
    places = torch.arange(found.shape[2]).expand(len(found), -1) if keys is None else keys
    # an answer says something of a token where it is defined and not that of the token itself
    says = ~found.isnan().all(2, keepdim=True) & (columns[..., None] != places[:, None])
    least = torch.where(says, found.nan_to_num(), 1.0).amin(1).masked_fill(~says.any(1), 0.0)
    held, which = least.max(1)
    if not (held > NEARLY_ALL).all():
        return {}
    holders = places.gather(1, which[:, None])
    text = f"{_named(texts, holders.tolist())} holds {_short(float(held.min()))} of every answer"
    if kept is None and sinks is not None and bool(sinks().gather(1, holders).all()):
        return {"one_token": f"{text}: this shows the sink and nothing else; without='sinks' sets it aside"}
    left = texts.valid if kept is None else texts.valid & (kept > 0)
    if causal and bool((left.int().argmax(1) == holders[:, 0]).all()):
        text += (
            ": each layer of a causal model passes shares to earlier tokens, and the first one gathers them"
        )
    return {"one_token": text}


def one_token_of_product(found: xr.DataArray, texts: Labelled, causal: bool) -> xr.DataArray:
    """A result [batch, query, key] of another product of maps, with the attribute `one_token` where it has one."""
    shares = (found / found.sum("key")).values
    return found.assign_attrs(one_token(texts, causal, shares, torch.from_numpy(found.position.values)))


def sinks_of(record: Record, layers: Sequence[int]) -> Tensor:
    """The sinks of each text, bool [batch, key]."""
    places = [place for place, layer in enumerate(record.layers) if layer in layers]
    return (rules.shares(record)[:, places].nanmean((1, 2)) > rules.SHARE) & record.key_axis.valid


def _named(texts: Labelled, columns: Sequence[Sequence[int]]) -> str:
    """Tokens of each text by their place among its real tokens, such as "token 0 ('The')"."""
    told = []
    for row, picked in enumerate(columns[:TOLD]):
        real = texts.valid[row].cumsum(0) - 1
        words = [f"token {int(real[j])} ({texts.strings[row][j]!r})" for j in picked]
        told.append(f"text {row}: " * (len(columns) > 1) + (" and ".join(words) or "no token"))
    return "; ".join([*told, *[f"and so on for {len(columns)} texts"] * (len(columns) > TOLD)])


def _short(share: float) -> str:
    """A share with as many nines as it has, so that 0.99997 does not become 1."""
    return f"{share:.5f}".rstrip("0") if share < 0.999995 else "all"
