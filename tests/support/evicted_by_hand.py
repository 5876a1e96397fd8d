"""Keys evicted by hand: chosen by their scores, and taken out of transformers' own cache."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

RULES = ("observed", "windowed", "expected", "critical", "recent")


def kept_by_hand(scores: Any, way: str, count: int) -> np.ndarray:
    """Of one text: the kept keys in their order, [layer, kv_head, kept]."""
    layers, heads, keys = scores.value_norm.shape
    found = np.zeros((layers, heads, count), dtype=int)
    for layer in range(layers):
        for head in range(heads):
            at = scores.isel(layer=layer, kv_head=head)
            if way == "recent":
                best = list(range(keys))[::-1]
            elif way == "critical":
                plain = at.score.sel(by="windowed").fillna(np.inf).values
                best = list(np.argsort(-plain, kind="stable")[: count // 2])
                second = at.by_output.sel(by="windowed").fillna(np.inf).values
                best += [j for j in np.argsort(-second, kind="stable") if j not in best]
            else:
                of = at.by_value if way == "expected" else at.score
                best = list(np.argsort(-of.sel(by=way).fillna(np.inf).values, kind="stable"))
            found[layer, head] = sorted(best[:count])
    return found


def logits_by_hand(twin: Any, ids: Tensor, first: int, kept: np.ndarray | None) -> Tensor:
    """Logits behind the first part of one text, from a cache that holds the kept keys alone, [position, vocab]."""
    with torch.no_grad():
        cache = twin(ids[:, :first], use_cache=True).past_key_values
        for layer, each in enumerate(cache.layers if kept is not None else []):
            assert kept is not None
            places = torch.from_numpy(kept[layer])[None, :, :, None].expand(-1, -1, -1, each.keys.shape[-1])
            each.keys, each.values = each.keys.gather(2, places), each.values.gather(2, places)
        positions = torch.arange(first, ids.shape[1])[None]
        return twin(ids[:, first:], past_key_values=cache, position_ids=positions).logits[0]


def loss_by_hand(twin: Any, ids: Tensor, first: int, kept: np.ndarray | None) -> Tensor:
    logits = logits_by_hand(twin, ids, first, kept)[:-1].log_softmax(-1)
    return -logits.gather(-1, ids[0, first + 1 :, None])[:, 0]
