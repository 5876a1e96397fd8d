"""Relative position biases of attention whose heads are cut: T5 computes them in the first layer, for all layers.

The bias of a head stays with the head. Where all layers keep the same heads, the one table is cut; where they do not,
each layer that needs one gets a table of its own, and takes no bias from the layer below.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

TABLE = "relative_attention_bias"


def cut_biases(holders: Mapping[int, Any], masks: Mapping[int, Tensor], heads: int) -> None:
    """Cut the tables of a stack. `holders` are its attention modules by layer, `masks` bool [head] what goes."""
    kept = {layer: torch.nonzero(~masks.get(layer, torch.zeros(heads).bool()))[:, 0] for layer in holders}
    kept = {layer: found if len(found) else torch.tensor([0]) for layer, found in kept.items()}
    tables = {layer: getattr(holder, TABLE, None) for layer, holder in holders.items()}
    tables = {
        layer: t for layer, t in tables.items() if isinstance(t, nn.Embedding) and t.embedding_dim == heads
    }
    alone = bool(tables) and len(tables) < len(holders)  # other layers take what the first one computed
    zero = not tables and all(hasattr(holder, f"has_{TABLE}") for holder in holders.values())
    first = next(iter(tables.values()), None)
    if (alone or zero) and len({tuple(found.tolist()) for found in kept.values()}) > 1:
        for layer, holder in holders.items():
            if first is not None and layer not in tables:
                setattr(holder, TABLE, first)
                setattr(holder, f"has_{TABLE}", True)
                tables[layer] = first
            holder.forward = functools.partial(_own, holder.forward)
    for layer, table in tables.items():
        weight = table.weight.detach().index_select(1, kept[layer].to(table.weight.device))
        setattr(
            holders[layer], TABLE, nn.Embedding.from_pretrained(weight, freeze=not table.weight.requires_grad)
        )


def _own(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The layer computes its own bias: that of another layer has other heads."""
    return forward(*args, **{**kwargs, "position_bias": None})
