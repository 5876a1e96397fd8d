"""Loadings against a float64 loop over layers that holds patterns, scales and MLPs, and edges that sum to a logit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import limits
import numpy as np
import pytest
import torch
import xarray as xr
from torch import Tensor

from headwater.analyses.logits.head_loadings import head_loadings
from headwater.lens.errors import AnalysisError

IDS = torch.tensor([[3, 4, 9, 5, 4, 3, 14, 5, 30], [6, 3, 6, 4, 21, 6, 3, 1, 17]])
ANSWER, WRONG = 11, 23


def by_hand(twin: Any, ids: Tensor, begin: int, written: Tensor, without: tuple[int, int] | None) -> Tensor:
    """What an addition [position, d_model] to the stream before layer `begin` gives to the answer at the last token.

    `without`: a head through which it does not pass.
    """
    with torch.no_grad():
        out = twin(ids, output_attentions=True, output_hidden_states=True)
        scale = [(h[0].square().mean(-1, keepdim=True) + 1e-6).rsqrt() for h in out.hidden_states[:-1]]
        x = written
        for layer, block in enumerate(twin.model.layers):
            if layer < begin:
                continue
            attention = block.self_attn
            v = (x * scale[layer] * block.input_layernorm.weight) @ attention.v_proj.weight.T
            heads = v.unflatten(-1, (-1, 8)).transpose(0, 1).repeat_interleave(2, 0)
            z = out.attentions[layer][0] @ heads
            if without is not None and without[0] == layer:
                z[without[1]] = 0
            x = x + z.transpose(0, 1).flatten(1) @ attention.o_proj.weight.T
        end = last_stream(twin, ids)
        last = (end.square().mean() + 1e-6).rsqrt() * twin.model.norm.weight * x[-1]
        return last @ (twin.lm_head.weight[ANSWER] - twin.lm_head.weight[WRONG])


def last_stream(twin: Any, ids: Tensor) -> Tensor:
    """The stream at the last token in front of the last norm."""
    seen: list[Tensor] = []
    hook = twin.model.norm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    twin(ids)
    hook.remove()
    return seen[0][0, -1]


@pytest.mark.parametrize(("source", "place", "begin"), [("embed", 2, 0), ("mlp.0", None, 1), ("0.2", 1, 1)])
def test_loadings_of_a_loop_over_layers(pairs: Callable, source: str, place: int | None, begin: int) -> None:
    pair = pairs("llama")
    found = head_loadings(pair.model, IDS, source, place, answer=ANSWER, wrong=WRONG)
    for row, ids in enumerate(IDS.split(1)):
        block = pair.twin.model.layers[0]
        seen: list[Tensor] = []
        module = {"embed": pair.twin.model.embed_tokens, "mlp.0": block.mlp, "0.2": block.self_attn.o_proj}[
            source
        ]
        hook = module.register_forward_hook(
            lambda _, args, out, seen=seen: seen.append(args[0] if source == "0.2" else out)
        )
        with torch.no_grad():
            pair.twin(ids)
        hook.remove()
        written = seen[0][0].detach()
        if source == "0.2":
            written = written[:, 16:24] @ block.self_attn.o_proj.weight[:, 16:24].T.detach()
        if place is not None:
            written = written * (torch.arange(len(written)) == place)[:, None]
        total = by_hand(pair.twin, ids, begin, written, None)
        np.testing.assert_allclose(found.total[row], total, rtol=1e-4, atol=1e-7)
        np.testing.assert_allclose(
            found.direct[row], by_hand(pair.twin, ids, 3, written, None), rtol=1e-4, atol=1e-7
        )
        assert bool(found.loading[row, :begin].isnull().all())
        for layer in range(begin, 3):
            for head in range(4):
                less = total - by_hand(pair.twin, ids, begin, written, (layer, head))
                np.testing.assert_allclose(found.loading[row, layer, head], less, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(
        (found.loading.sum("head") + found.bypass)[:, begin:].T, [found.total] * (3 - begin)
    )
    assert float(abs(found.loading).max()) > 1e-4


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_edges_from_embedding_and_mlps_are_the_logit(pairs: Callable, name: str) -> None:
    pair = pairs(name)
    edges = [
        head_loadings(pair.model, IDS, source, answer=ANSWER, wrong=WRONG).total.values
        for source in ("embed", "mlp.0", "mlp.1", "mlp.2")
    ]
    with torch.no_grad():
        logits = pair.twin(IDS).logits[:, -1]
    cap = pair.twin.config.final_logit_softcapping if name == "gemma2" else None
    logits = logits if cap is None else cap * torch.atanh(logits / cap)
    np.testing.assert_allclose(sum(edges), logits[:, ANSWER] - logits[:, WRONG], rtol=1e-4, atol=1e-6)


def test_neither_blocks_of_rows_nor_no_grad_change_loadings(pairs: Callable) -> None:
    pair = pairs("llama")
    whole = head_loadings(pair.model, IDS, answer=ANSWER)
    with torch.no_grad(), limits.block_elements(60):
        found = head_loadings(pair.model, IDS, answer=ANSWER)
    xr.testing.assert_allclose(found, whole, rtol=1e-4, atol=1e-6)


def test_a_part_that_is_not_there_is_refused(pairs: Callable) -> None:
    with pytest.raises(AnalysisError, match=r"has no part 'mlp\.9' that writes"):
        head_loadings(pairs("llama").model, IDS, "mlp.9", answer=ANSWER)
    with pytest.raises(AnalysisError, match="is no sum of what its parts add"):
        head_loadings(pairs("bert").model, IDS, answer=ANSWER)
