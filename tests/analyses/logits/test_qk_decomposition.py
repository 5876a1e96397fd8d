"""Decompositions of scores against the twin's own queries, keys and attention in float64.

Mutations seen to fail: the rotation left out, the key taken from another group, the projection's bias forgotten.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
import transformers as hf
from dense_patching import with_biases
from patch_pairs import CLEAN

import headwater as hw
from headwater import analyses
from headwater.lens.errors import AnalysisError, HeadError

NAMES = ("gpt2", "llama", "mistral", "gemma2", "gpt_oss")


@pytest.mark.parametrize("name", NAMES)
def test_scores_are_those_of_the_model(pairs: Callable, name: str) -> None:
    """Differences of scores are differences of the twin's log weights, wherever nothing but softmax is between."""
    pair = pairs(name)
    scores = [analyses.qk_decomposition(pair.model, CLEAN, head="2.3", query=5, key=key) for key in (5, 3)]
    for found in scores:
        np.testing.assert_allclose(found.sum(("query_part", "key_part")), found.total, atol=1e-4, rtol=1e-4)
        each = [f"{layer}.{head}" for layer in range(2) for head in range(4)]
        named = found.query_part.values.tolist()
        assert set(named) == {"embed", *each, "bias.0", "bias.1", "mlp.0", "mlp.1", "bias"}
    logs = pair.maps(CLEAN)[2, :, 3, 5].log()
    seen = (scores[0].total - scores[1].total).values
    if name == "gemma2":  # capped behind the score
        capped = [2 * np.tanh(found.total.values / 2) for found in scores]
        seen = capped[0] - capped[1]
    np.testing.assert_allclose(seen, logs[:, 5] - logs[:, 3], atol=1e-4)


def test_each_term_is_what_goes_when_a_part_does(pairs: Callable) -> None:
    """In layer 0 of GPT-2 the parts are the embedding and the biases, which can be had from the weights alone."""
    twin = with_biases(pairs("gpt2").twin)
    model = hw.load(copy.deepcopy(twin).float())
    found = analyses.qk_decomposition(model, CLEAN, head="0.2", query=4, key=1)
    assert found.query_part.values.tolist() == ["embed", "bias"]
    block = twin.transformer.h[0]
    with torch.no_grad():
        stream = twin.transformer.wte(CLEAN) + twin.transformer.wpe(torch.arange(6))
        centred = stream - stream.mean(-1, keepdim=True)
        normal = centred / (stream.var(-1, correction=0, keepdim=True) + 1e-5).sqrt() * block.ln_1.weight
        weight, bias = (
            block.attn.c_attn.weight,
            block.attn.c_attn.bias + block.ln_1.bias @ block.attn.c_attn.weight,
        )
        q, k = normal[:, 4] @ weight[:, 16:24], normal[:, 1] @ weight[:, 48:56]
        scale = 8**-0.5
        expected = {
            ("embed", "embed"): (q * k).sum(-1), ("embed", "bias"): (q * bias[48:56]).sum(-1),
            ("bias", "embed"): (bias[16:24] * k).sum(-1), ("bias", "bias"): (bias[16:24] * bias[48:56]).sum().expand(2),
        }  # fmt: skip
    for (one, other), value in expected.items():
        np.testing.assert_allclose(
            found.sel(query_part=one, key_part=other), scale * value, atol=1e-4, err_msg=f"{one} {other}"
        )


def test_the_largest_weight_is_looked_at(pairs: Callable) -> None:
    pair = pairs("llama")
    found = analyses.qk_decomposition(pair.model, ["w5 w17 w30 w8", "w9 w4"], head="1.1")
    record = pair.model.record(["w5 w17 w30 w8", "w9 w4"])
    rows = record.pattern(1, 1)
    assert found.key.values.tolist() == [int(rows[0, 3].argmax()), int(rows[1, 1, :2].argmax())]


def test_what_can_not_be_taken_apart(pairs: Callable) -> None:
    torch.manual_seed(0)
    sizes = hf.Qwen3Config(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8,
    )  # fmt: skip
    model = hw.load(hf.Qwen3ForCausalLM(sizes).eval())
    with pytest.raises(AnalysisError, match="a norm on queries and keys"):
        analyses.qk_decomposition(model, CLEAN, head="1.0")
    with pytest.raises(HeadError, match=r"no such head: 3\.0"):
        analyses.qk_decomposition(pairs("llama").model, CLEAN, head="3.0")
    with pytest.raises(AnalysisError, match="key=6"):
        analyses.qk_decomposition(pairs("llama").model, CLEAN, key=6)
    with pytest.raises(AnalysisError, match="query=0 does not see key=2 in layer 1"):
        analyses.qk_decomposition(pairs("llama").model, CLEAN, head="1.0", query=0, key=2)
    with pytest.raises(AnalysisError, match="query=5 does not see key=0"):
        analyses.qk_decomposition(pairs("mistral").model, CLEAN, query=5, key=0)  # a window of five
