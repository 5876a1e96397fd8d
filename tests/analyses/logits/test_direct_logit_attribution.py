"""Direct logit attribution adds up to the logits of transformers' eager run in float64, part by part.

Mutations seen to fail: the final norm's bias forgotten, the mean left in, the norm behind Gemma's attention left out,
values of the wrong group, the scale of another position.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import dense_patching
import numpy as np
import pytest
import torch
import transformers as hf
from patch_pairs import ANSWER, CLEAN, WRONG
from torch import Tensor

import headwater as hw
from headwater import analyses
from headwater.lens.errors import AnalysisError

RIGHT, OTHER = torch.tensor([11, 12]), torch.tensor([20, 45])


def before_the_cap(twin, ids: Tensor) -> Tensor:
    """Logits as the unembedding gives them."""
    kept = []
    handle = twin.get_output_embeddings().register_forward_hook(lambda _, __, output: kept.append(output))
    with torch.no_grad():
        twin(ids)
    handle.remove()
    return kept[0]


def difference(logits: Tensor, position: int) -> Tensor:
    return logits[range(2), position, RIGHT] - logits[range(2), position, OTHER]


@pytest.mark.parametrize("position", [-1, 2])
def test_parts_add_up(pairs: Callable, position: int) -> None:
    for name in ("gpt2", "llama", "mistral", "gemma2", "gpt_oss"):
        pair = pairs(name)
        given = {"answer": ANSWER, "wrong": WRONG, "position": position}
        found = analyses.direct_logit_attribution(pair.model, CLEAN, **given)
        expected = difference(before_the_cap(pair.twin, CLEAN), position)
        np.testing.assert_allclose(found.sum("component"), expected, atol=2e-5, err_msg=name)
        np.testing.assert_allclose(found.total, expected, atol=2e-5)
        assert found.attrs["soft_cap"] == (30.0 if name == "gemma2" else "")
        heads = analyses.direct_logit_attribution(pair.model, CLEAN, unit="head", **given)
        for layer in range(3):
            for head in range(4):
                np.testing.assert_allclose(heads[:, layer, head], found.sel(component=f"{layer}.{head}"))
        sources = analyses.direct_logit_attribution(pair.model, CLEAN, unit="source", **given)
        np.testing.assert_allclose(sources.sum("key"), heads, atol=2e-5)
        if position == 2:
            np.testing.assert_allclose(sources[..., 3:], 0, atol=1e-9)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_each_part_by_itself(pairs: Callable, name: str) -> None:
    """The stream of the twin less one part, through its own norm with the scale of the whole."""
    pair = pairs(name)
    twin, sites = pair.twin, dense_patching.seen(pair.twin, CLEAN)
    norm = twin.transformer.ln_f if name == "gpt2" else twin.model.norm
    with torch.no_grad():
        stream = twin(CLEAN, output_hidden_states=True)
        kept = []
        handle = norm.register_forward_pre_hook(lambda _, args: kept.append(args[0]))
        twin(CLEAN)
        handle.remove()
        whole = kept[0][:, -1]
        scale = whole.std(-1, correction=0) if name == "gpt2" else whole.square().mean(-1).sqrt()
        weight = twin.lm_head.weight[RIGHT] - twin.lm_head.weight[OTHER]

        def share(part: Tensor) -> Tensor:
            part = part - part.mean(-1, keepdim=True) if name == "gpt2" else part
            return (part / scale[:, None] * norm.weight * weight).sum(-1)

        found = analyses.direct_logit_attribution(pair.model, CLEAN, ANSWER, WRONG)
        np.testing.assert_allclose(
            found.sel(component="embed"), share(stream.hidden_states[0][:, -1]), atol=1e-4
        )
        np.testing.assert_allclose(found.sel(component="mlp.1"), share(sites["mlp", 1][:, -1]), atol=1e-4)
        z = sites["z", 2][:, -1, 3]
        output = (
            twin.transformer.h[2].attn.c_proj.weight[24:]
            if name == "gpt2"
            else twin.model.layers[2].self_attn.o_proj.weight.T[24:]
        )
        np.testing.assert_allclose(found.sel(component="2.3"), share(z @ output), atol=1e-4)


def test_sources_are_weights_times_values(pairs: Callable) -> None:
    """Without the weight of one key its share is what goes away, the scale being frozen."""
    pair = pairs("llama")
    sites = dense_patching.seen(pair.twin, CLEAN)
    heads = analyses.direct_logit_attribution(pair.model, CLEAN, ANSWER, WRONG, unit="head")
    sources = analyses.direct_logit_attribution(pair.model, CLEAN, ANSWER, WRONG, unit="source")
    z = sites["z", 2][:, -1, 3]
    term = sites["pattern", 2][:, 3, -1, 1, None] * sites["v", 2][:, 1, 1]
    ratio = sources.values[:, 2, 3, 1] / heads.values[:, 2, 3]
    output = pair.twin.model.layers[2].self_attn.o_proj.weight.T[24:].detach()
    norm, head = pair.twin.model.norm.weight.detach(), pair.twin.lm_head.weight.detach()
    read = output @ (norm * (head[RIGHT] - head[OTHER]))[..., None]
    expected = (term[:, None] @ read)[:, 0, 0] / (z[:, None] @ read)[:, 0, 0]
    np.testing.assert_allclose(ratio, expected, rtol=1e-3)


def test_other_blocks(pairs: Callable) -> None:
    """Parallel blocks, biases everywhere, an unembedding with a bias; texts of unequal length; one logit alone."""
    shape: dict[str, Any] = {
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
    }
    torch.manual_seed(0)
    plain = hf.PhiForCausalLM(hf.PhiConfig(**shape, num_attention_heads=4, initializer_range=0.2)).eval()
    with torch.no_grad():
        for name, weight in plain.named_parameters():
            if name.endswith("bias"):
                weight.normal_()
    model = hw.load(plain)
    found = analyses.direct_logit_attribution(model, CLEAN, ["#11", "#12"])
    logits = model(CLEAN)[range(2), -1, RIGHT]
    np.testing.assert_allclose(found.sum("component"), logits, atol=1e-4)
    words = pairs("gpt2").model
    found = analyses.direct_logit_attribution(words, ["w5 w17 w30", "w4"], "w9", "w8", unit="source")
    assert np.isnan(found.values[1, ..., 1:]).all()
    alone = analyses.direct_logit_attribution(words, "w4", "w9", "w8", unit="source")
    np.testing.assert_allclose(found.values[1, ..., :1], alone.values[0], atol=1e-6)


def test_what_can_not_be_taken_apart(pairs: Callable) -> None:
    with pytest.raises(AnalysisError, match="is no sum of what its parts add"):
        analyses.direct_logit_attribution(pairs("bert").model, CLEAN)
    model = pairs("llama").model
    with pytest.raises(AnalysisError, match="unit='layer' is unknown"):
        analyses.direct_logit_attribution(model, CLEAN, unit="layer")
    with pytest.raises(AnalysisError, match="position=6"):
        analyses.direct_logit_attribution(model, CLEAN, position=6)
    with model.edit(hw.ScaleHeads({"1.1": 0.0})):
        found = analyses.direct_logit_attribution(model, CLEAN, ANSWER, WRONG)
        np.testing.assert_allclose(found.sel(component="1.1"), 0)
        np.testing.assert_allclose(found.sum("component"), found.total, atol=2e-5)
        with pytest.raises(AnalysisError, match="head outputs are edited"):
            analyses.direct_logit_attribution(model, CLEAN, unit="source")
