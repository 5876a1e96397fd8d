"""Scores of cache compression against dense float64 maps and, for queries to come, transformers' own rotations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from ragged import padded
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, rotate_half

import headwater as hw
from headwater.analyses.caches.kv_scores import kv_scores
from headwater.lens.errors import AnalysisError

WINDOW, POOL, FUTURE, SINKS, WIDTH = 3, 3, 7, 2, 8
OVER = {"mean": np.mean, "sum": np.sum, "max": np.max}


def projected(twin: Any, name: str, ids: Tensor) -> tuple[list[tuple[Tensor, ...]], list[Tensor]]:
    """Queries before they are turned, keys as they are cached and values, [head, position, d] by layer; the output
    matrices [head, d, d_model]."""
    seen: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Tensor) -> None:
        seen.append(output[0].unflatten(-1, (-1, WIDTH)).transpose(0, 1))

    blocks = twin.transformer.h if name == "gpt2" else twin.model.layers
    attentions = [block.attn if name == "gpt2" else block.self_attn for block in blocks]
    parts = [[a.c_attn] if name == "gpt2" else [a.q_proj, a.k_proj, a.v_proj] for a in attentions]
    hooks = [module.register_forward_hook(keep) for three in parts for module in three]
    with torch.no_grad():
        twin(ids)
    for hook in hooks:
        hook.remove()
    if name == "gpt2":
        layers = [each.split(4) for each in seen]
        matrices = [a.c_proj.weight for a in attentions]
    else:
        cos, sin = twin.model.rotary_emb(seen[0], torch.arange(ids.shape[1])[None])
        layers = [
            (q, apply_rotary_pos_emb(q[None], k[None], cos, sin)[1][0], v)
            for q, k, v in zip(*(seen[n::3] for n in range(3)), strict=True)
        ]
        matrices = [a.o_proj.weight.mT for a in attentions]
    return layers, [matrix.detach().unflatten(0, (-1, WIDTH)) for matrix in matrices]


def expected_weights(twin: Any, name: str, q: Tensor, k: Tensor) -> Tensor:
    """The softmax over the keys behind the sinks for queries that are still to come, [head, key]."""
    turn = torch.eye(WIDTH).double()
    if name != "gpt2":
        cos, sin = twin.model.rotary_emb(q, torch.arange(q.shape[1], q.shape[1] + FUTURE)[None])
        unit = torch.eye(WIDTH).double()[:, None]
        turn = (unit * cos + rotate_half(unit) * sin).mean(1)  # row i: the unit query i, turned
    found = []
    for head in range(len(q)):
        mean = q[head, SINKS:].mean(0) @ turn
        spread = turn.mT @ torch.cov(q[head, SINKS:].mT, correction=0) @ turn
        keys = k[head * len(k) // len(q), SINKS:]
        logits = [key @ mean / WIDTH**0.5 + key @ spread @ key / WIDTH / 2 for key in keys]
        found.append(torch.stack(logits).softmax(0))
    return torch.stack(found).detach()


def by_hand(dense: np.ndarray, late: Tensor) -> dict[str, np.ndarray]:
    """The scores of one layer's dense maps [head, query, key], by head; `late` are those of queries to come."""
    count = dense.shape[-1]
    found = {"observed": dense.sum(1) / (dense > 0).sum(1)}
    found["windowed"], found["expected"] = np.full((2, len(dense), count), np.nan)
    mean = dense[:, -WINDOW:, :-WINDOW].mean(1)
    for j in range(count - WINDOW):
        found["windowed"][:, j] = mean[:, max(j - POOL // 2, 0) : j + POOL // 2 + 1].sum(-1) / POOL
    found["expected"][:, SINKS:] = late.numpy()
    return found


@pytest.mark.parametrize(
    ("name", "group"),
    [("gpt2", "mean"), ("llama", "mean"), ("llama", "sum"), ("llama", "max"), ("mistral", "mean")],
)
def test_scores_by_dense_maps(pairs: Callable, name: str, group: Any) -> None:
    pair = pairs(name)
    ids, mask = padded((9, 12, 6), side="left")
    tokens = pair.model.to_tokens(ids, mask)
    found = kv_scores(
        pair.model, tokens, window=WINDOW, pool=POOL, future=FUTURE, sinks=SINKS, group=group, batch_size=2
    )
    maps = pair.maps(ids, mask).numpy()
    kv = pair.model.n_kv_heads
    for b, kept in enumerate(mask.bool()):
        place = kept.nonzero()[:, 0].numpy()
        layers, matrices = projected(pair.twin, name, ids[b, kept][None])
        for layer, (q, k, v) in enumerate(layers):
            hand = by_hand(maps[layer, b][:, place][..., place], expected_weights(pair.twin, name, q, k))
            norm = v.norm(dim=-1).detach().numpy()
            written = [
                np.mean([(v[g] @ o).abs().sum(-1).detach().numpy() for o in matrices[layer].chunk(kv)[g]], 0)
                for g in range(kv)
            ]
            mine = found.isel(batch=b, layer=layer, key=place)
            np.testing.assert_allclose(mine.value_norm, norm, rtol=1e-4)
            np.testing.assert_allclose(mine.output_norm, written, rtol=1e-4)
            for which, values in hand.items():
                shared = OVER[group](values.reshape(kv, 4 // kv, -1), axis=1)
                at = mine.sel(by=which)
                np.testing.assert_allclose(at.score, shared, rtol=2e-4, atol=1e-7)
                np.testing.assert_allclose(at.by_value, shared * norm, rtol=3e-4, atol=1e-7)
                np.testing.assert_allclose(at.by_output, (shared + 1e-4) * written, rtol=3e-4, atol=1e-7)
        assert np.isnan(found.score[:, b][..., ~kept.numpy()]).all()


def test_what_is_refused(pairs: Callable) -> None:
    ids = torch.arange(3, 12)[None]
    with pytest.raises(AnalysisError, match="too short for window=64"):
        kv_scores(pairs("llama").model, ids)
    with pytest.raises(AnalysisError, match="give an odd number"):
        kv_scores(pairs("llama").model, ids, window=2, pool=4, sinks=1)
    with pytest.raises(AnalysisError, match="keeps no keys"):
        kv_scores(pairs("bert").model, ids, window=2, sinks=1)


def test_an_even_head_scores_all_keys_alike(uniform: hw.HookedModel) -> None:
    found = kv_scores(uniform, torch.arange(3, 15)[None], window=4, pool=1, sinks=0)
    np.testing.assert_allclose(found.score.sel(by="expected"), 1 / 12, rtol=1e-5)
    late = np.mean(1 / np.arange(9, 13))
    np.testing.assert_allclose(found.score.sel(by="windowed")[..., :8], late, rtol=1e-5)
