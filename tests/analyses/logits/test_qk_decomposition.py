"""Decompositions of scores against the twin's own queries, keys and attention in float64.

Mutations seen to fail: the rotation left out, the key taken from another group, the projection's bias forgotten.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import gated_models
import numpy as np
import pytest
import torch
import transformers as hf
from dense_patching import with_biases
from patch_pairs import CLEAN

import headwater as hw
from headwater import analyses
from headwater.analyses._streams import head_inputs
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


@pytest.mark.parametrize("name", ["Qwen3Next", "Laguna"])
def test_a_norm_on_queries_and_keys_keeps_its_scale(name: str) -> None:
    ids = torch.randint(3, 90, (1, 7), generator=torch.Generator().manual_seed(5))
    eager, kept = gated_models.gated(name), {}
    attention = gated_models.attention_of(eager, 1)
    for part in ("q", "k"):
        projection, norm = (getattr(attention, f"{part}_{kind}") for kind in ("proj", "norm"))
        projection.register_forward_hook(lambda m, args, out, part=part: kept.update({f"{part}.x": args[0]}))
        norm.register_forward_hook(lambda m, args, out, part=part: kept.update({part: (args[0], out)}))
    with torch.no_grad():
        eager(input_ids=ids, use_cache=False)
    model = hw.load(gated_models.gated(name))
    found = analyses.qk_decomposition(model, ids, head="1.3", query=-1, key=2)
    record = model.record(ids)
    map = record.map(1)
    score = float(map.rule.scale * map.q[0, 3, 6] @ map.k[0, 1, 2])
    assert float(found.total[0]) == pytest.approx(score, rel=1e-5)
    assert float(found.sum()) == pytest.approx(score, rel=1e-5, abs=1e-5)
    # the part of the embedding, by hand: the norms divide by what they divide the run's own vectors by
    q_in, q_out = (kept["q"][n].reshape(1, 7, 4, 8)[0, 6, 3].double() for n in (0, 1))
    embedded = eager.get_input_embeddings()(ids)[0, 6]
    entering = [h.double() for h in eager(input_ids=ids, output_hidden_states=True).hidden_states][1][0, 6]
    gain = (kept["q.x"][0, 6].double() / entering) * embedded.double()
    raw = (attention.q_proj.weight.detach().double() @ gain.detach()).reshape(4, -1)[3, :8]
    turned = raw * (q_out / q_in).detach()
    rotated = _turned_as(map.q[0, 3, 6].double(), q_out.detach(), turned)
    part = map.rule.scale * rotated @ map.k[0, 1, 2].double()
    assert float(found.sel(query_part="embed").sum()) == pytest.approx(part.item(), rel=1e-4, abs=1e-5)


def _turned_as(after: torch.Tensor, before: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
    """A vector after the rotation that turned `before` into `after`: by pairs (i, i + d/2) of the rotary features."""
    found = vector.clone()
    size = next((n for n in (2, 4) if torch.allclose(before[n:], after[n:], atol=1e-6)), 8)
    half = size // 2
    a, b = torch.complex(before[:half], before[half:size]), torch.complex(after[:half], after[half:size])
    turned = torch.complex(vector[:half], vector[half:size]) * b / a
    found[:half], found[half:size] = turned.real, turned.imag
    return found


def test_what_can_not_be_taken_apart(pairs: Callable) -> None:
    torch.manual_seed(0)
    sizes = hf.PersimmonConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        qk_layernorm=True,
    )  # fmt: skip
    model = hw.load(hf.PersimmonForCausalLM(sizes).eval())
    torch.nn.init.normal_(model.hf.model.layers[1].self_attn.q_layernorm.bias)  # a norm that adds something
    with pytest.raises(AnalysisError, match="is not linear"):
        analyses.qk_decomposition(model, CLEAN, head="1.0")
    with pytest.raises(HeadError, match=r"no such head: 3\.0"):
        analyses.qk_decomposition(pairs("llama").model, CLEAN, head="3.0")
    with pytest.raises(AnalysisError, match="key=6"):
        analyses.qk_decomposition(pairs("llama").model, CLEAN, key=6)
    with pytest.raises(AnalysisError, match="query=0 does not see key=2 in layer 1"):
        analyses.qk_decomposition(pairs("llama").model, CLEAN, head="1.0", query=0, key=2)
    with pytest.raises(AnalysisError, match="query=5 does not see key=0"):
        analyses.qk_decomposition(pairs("mistral").model, CLEAN, query=5, key=0)  # a window of five


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_the_rotation_of_two_tokens_in_place_is_that_of_the_whole_text(
    pairs: Callable, name: str, monkeypatch
) -> None:
    """A text is not run once for each dimension of a head, and what comes is what such runs give."""
    model, asked = pairs(name).model, {"head": "2.3", "query": 5, "key": 2}
    lengths = []
    logits = head_inputs.Swap.logits
    monkeypatch.setattr(
        head_inputs.Swap,
        "logits",
        lambda self, ids, *more: (lengths.append(ids.shape), logits(self, ids, *more))[1],
    )
    short = analyses.qk_decomposition(model, CLEAN, **asked)
    assert lengths == [(1, CLEAN.shape[1]), (model.shape(2).d_head, 2)] * len(CLEAN)
    monkeypatch.setattr(head_inputs, "_pair", lambda *given: None)
    whole = analyses.qk_decomposition(model, CLEAN, **asked)
    np.testing.assert_allclose(short, whole, atol=1e-5)


def test_two_tokens_that_do_not_give_the_runs_own_are_not_believed(pairs: Callable, monkeypatch) -> None:
    model, asked = pairs("llama").model, {"head": "2.3", "query": 5, "key": 2}
    expected = analyses.qk_decomposition(model, CLEAN, **asked)
    pair = head_inputs._pair
    monkeypatch.setattr(
        head_inputs, "_pair", lambda model, ids, places: pair(model, ids, (4, 1))
    )  # other positions
    np.testing.assert_allclose(analyses.qk_decomposition(model, CLEAN, **asked), expected, atol=1e-6)
