"""Slices against the scores of transformers' own attention, and traces against the paper's formulas written out.

Mutations seen to fail: biases left out of the form, rotations of query and key exchanged, the sign of the query's side
left out, the norm's scale taken at the other position, contributions cut before they exceed the share, the mean key not
turned from where it stands, the first token's firings counted.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import networkx as nx
import numpy as np
import planted_models
import pytest
import torch
import transformers as hf

import headwater as hw
from headwater import analyses
from headwater.analyses._streams.score_slices import Forms, leading, used
from headwater.analyses.circuits._graph_files import read_circuit, write_circuit
from headwater.analyses.circuits._signal_tracing import Rules, Walk, statistics
from headwater.lens.errors import AnalysisError, HeadError
from headwater.lens.naming.heads import Head

IDS = torch.tensor([3, 9, 17, 5, 22, 9, 40, 8])


def unbiased(model: hf.PreTrainedModel) -> None:
    """Random biases and gains in place of zeros and ones, so that folding them matters."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "ln_" in name or "norm" in name:
                parameter += 0.3 * torch.randn_like(parameter)


@pytest.fixture(scope="module")
def gpt2() -> hw.HookedModel:
    torch.manual_seed(0)
    config = hf.GPT2Config(
        vocab_size=61, n_embd=32, n_layer=3, n_head=4, n_positions=32, initializer_range=0.3
    )
    plain = hf.GPT2LMHeadModel(config).eval()
    unbiased(plain)
    return hw.load(plain.double())


@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral", "gpt_oss"])
def test_slices_sum_to_the_scores_that_made_the_weights(pairs, name: str) -> None:
    """log A_ij - log A_ii is the difference of two scores, whatever rotates them and however many heads share keys."""
    pair = pairs(name)
    forms = Forms(pair.model, [IDS[None]])
    prompt, maps = forms.run(IDS[None]), pair.maps(IDS[None])[:, 0].log()
    for layer, form in forms.layers.items():
        whole = form.scores(prompt.x[layer])
        for head, query, key in ((0, 7, 4), (3, 5, 3), (2, 4, 4), (1, 0, 0)):
            x = prompt.x[layer]
            slices = form.slices(head, query, key)
            assert slices.strength.shape == (pair.model.d_head,)
            score = float(slices.terms(x[query], x[key]).sum())
            assert score == pytest.approx(float(whole[head, query, key]), abs=1e-9)
            own = float(form.slices(head, query, query).terms(x[query], x[query]).sum())
            seen = float(maps[layer, head, query, key] - maps[layer, head, query, query])
            assert (score - own) / math.sqrt(pair.model.d_head) == pytest.approx(seen, abs=2e-4)


def test_the_augmented_form_is_query_times_key(gpt2) -> None:
    """(x W_Q + b_Q)·(y W_K + b_K), by the model's own layers; the slices are orthonormal, of rank d_head."""
    forms = Forms(gpt2, [IDS[None]])
    prompt, block = forms.run(IDS[None]), gpt2.hf.transformer.h[1]
    _, cache = gpt2.run_with_cache(IDS[None], return_cache_object=False)
    with torch.no_grad():
        q, k, _ = block.attn.c_attn(block.ln_1(cache["blocks.1.hook_resid_pre"]))[0].split(32, -1)
    q, k = (part.unflatten(-1, (4, 8)).transpose(0, 1) for part in (q, k))
    torch.testing.assert_close(forms.layers[1].scores(prompt.x[1]), q @ k.mT)
    slices = forms.layers[1].slices(2, 0, 0)
    for axes in (slices.left, slices.right):
        torch.testing.assert_close(axes @ axes.mT, torch.eye(8, dtype=torch.float64))
    assert (slices.strength.diff() <= 0).all()


def test_the_fewest_that_exceed_a_share() -> None:
    values = torch.tensor([1.0, 5.0, -2.0, 3.0])
    assert leading(values, 7.0, 0.7).tolist() == [1]  # 5 > 4.9
    assert leading(values, 7.0, 0.8).tolist() == [1, 3]
    assert leading(values, 7.0, 1.0).tolist() == [1, 3]  # 8 > 7: the negative one follows
    assert leading(values.abs(), 11.0, 1.0).tolist() == [
        1,
        3,
        2,
        0,
    ]  # nothing exceeds all: every positive one
    assert used(-values, 0.7).tolist() == [1]  # a score below 0 uses what lowers it


def by_hand(
    model: hw.HookedModel, layer: int, head: int, i: int, j: int, constant: bool, relative: bool = False
) -> dict[str, dict]:
    """Contributions to both sides by the formulas, with Ω itself and numpy's decomposition of it."""
    _, cache = model.run_with_cache(IDS[None], return_cache_object=False)
    w = model.weights(layer, fold=True, centre=True)
    read = [torch.cat([m[head], b[head][None]]).double() for m, b in ((w.W_Q, w.b_Q), (w.W_K, w.b_K))]
    omega = read[0] @ read[1].T
    u, sigma, v = (torch.from_numpy(part) for part in np.linalg.svd(omega.numpy()))
    x = cache[f"blocks.{layer}.ln1.hook_normalized"][0].double()
    x = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)
    mean = cache[f"blocks.{layer}.attn.hook_pattern"][0, head, i].double() * float(relative)
    read = torch.nn.functional.one_hot(torch.tensor(j), len(x)) - mean  # how much of each key
    terms = [(float(sigma[k] * (x[i] @ u[:, k]) * (v[k] @ (read @ x))), k) for k in range(8)]
    total, kept, reached = sum(t for t, _ in terms), [], 0.0
    for term, k in sorted(terms, reverse=True):
        if reached > total:
            break
        kept.append(k)
        reached += term
    found: dict[str, dict] = {"q": {}, "k": {}}
    scale = cache[f"blocks.{layer}.ln1.hook_scale"][0].double()
    at_query = torch.nn.functional.one_hot(torch.tensor(i), len(x)).double()
    for side, shares, axes in (("q", at_query, u.T), ("k", read, v)):
        for earlier in range(layer):
            below = model.weights(earlier)
            for sender in range(4):
                y = cache[f"blocks.{earlier}.attn.hook_z"][0, :, sender] @ below.W_O[sender]
                y = torch.nn.functional.pad(y - y.mean(-1, keepdim=True), (0, 1), value=float(constant))
                heard = shares @ (y.double() / scale)
                found[side][f"{earlier}.{sender}"] = sum(
                    float((x[i] @ u[:, k]).sign() * sigma[k] ** 0.5 * (axes[k] @ heard)) for k in kept
                )
    return found


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("constant", [False, True])
def test_contributions_are_those_of_the_formulas(gpt2, constant: bool, relative: bool) -> None:
    pattern = gpt2.record(IDS[None]).pattern(2, 1)[0]
    query = 7
    key = int(pattern[query, 1:].argmax()) + 1
    graph = analyses.trace_signals(
        gpt2, IDS[None], roots="2.1", source=key, firing=float(pattern[query, key]) - 1e-6, constant=constant,
        relative=relative,
    )  # fmt: skip
    expected = by_hand(gpt2, 2, 1, query, key, constant, relative)
    for side, place in (("q", query), ("k", key)):
        values = expected[side]
        total, reached, wanted = sum(values.values()), 0.0, {}
        for name in sorted(values, key=lambda n: -values[n]):
            if total <= 0 or reached > 0.7 * total:
                break
            wanted[f"{name}@{place}"] = values[name]
            reached += values[name]
        into = graph.in_edges(f"2.1.{side}@{place}", data="weight")
        assert {sender: weight for sender, _, weight in into} == pytest.approx(wanted, rel=1e-5)
        assert graph.nodes[f"2.1.{side}@{place}"]["total"] == pytest.approx(sum(values.values()), rel=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral", "gpt_oss"])
def test_the_relative_score_is_that_of_the_weights(pairs, name: str) -> None:
    """`Σ_m A_im (log A_ij - log A_im)`, by transformers' own attention; rotated keys are met where they stand."""
    pair = pairs(name)
    forms = Forms(pair.model, [IDS[None]])
    walk = Walk(forms, forms.run(IDS[None]), Rules(0.5, 1.0, 0.7, False, "all", True), 0, lambda *_: "")
    maps = pair.maps(IDS[None])[:, 0]
    for layer, head, query, key in ((0, 0, 7, 4), (1, 3, 5, 3), (2, 2, 4, 1), (2, 1, 6, 6)):
        form, x = forms.layers[layer], walk.prompt.x[layer]
        parts = form.slices(head, query, key)
        heard = sum(
            share * (axes @ x[place]) for place, share, axes in walk._keys(Head(layer, head), query, key)
        )
        found = float((parts.strength * (parts.left @ x[query]) * heard).sum()) / math.sqrt(pair.model.d_head)
        row = maps[layer, head, query]
        seen = row > 0
        mean = row[seen] / row[seen].sum()
        expected = float((mean * (row[key].log() - row[seen].log())).sum())
        assert found == pytest.approx(expected, abs=3e-4), (layer, head, query, key)


def test_one_key_alone_has_no_relative_senders(induction) -> None:
    """A head all of whose weight is on one key has nothing to compare it with: its key's side hears nothing."""
    graph = analyses.trace_signals(induction, repeated(), roots="1.2", relative=True)
    plain = analyses.trace_signals(induction, repeated(), roots="1.2")
    weight = float(induction.record(repeated()).pattern(1, 2)[0][14, 5])
    assert weight > 0.99
    edge = graph.edges["0.1@5", "1.2.k@5"]["weight"] if graph.has_edge("0.1@5", "1.2.k@5") else 0.0
    assert abs(edge) < 0.05 * plain.edges["0.1@5", "1.2.k@5"]["weight"]


def test_firings_and_sizes_are_counted(induction, tmp_path: Path) -> None:
    """Pairs by a plain loop over the recorded maps; texts of the control are cut to the longest prompt."""
    once = torch.arange(1, 33)[None]
    graph = analyses.trace_signals(induction, repeated(), position=13, control=once)
    for what, ids, last in (("firings", repeated(), 13), ("control_firings", once[:, :15], 14)):
        forms = Forms(induction, [ids[:1]])
        prompt = forms.run(ids[:1])
        expected: dict[str, int] = {}
        for layer in induction.layers:
            for head in range(induction.n_heads):
                maps = induction.record(ids).pattern(layer, head)[0]
                scores = forms.layers[layer].scores(prompt.x[layer])[head]
                for i in range(last + 1):
                    for j in range(1, i + 1):
                        if maps[i, j] >= 0.5 and scores[i, j] >= 0:
                            expected[f"{layer}.{head}"] = expected.get(f"{layer}.{head}", 0) + 1
        assert json.loads(graph.graph[what]) == expected, what
    # a head of the previous token fires from 2 to 13: the first token does not count
    assert json.loads(graph.graph["firings"])["0.1"] == 12
    assert graph.graph["control_texts"] == 1
    names = [n for n, kind in graph.nodes(data="kind") if kind == "head"]
    kinds = [about["kind"] for _, _, about in graph.edges(data=True)]
    assert graph.graph["edges"] == kinds.count("edge") == graph.graph["edges_from_heads"]
    assert all(graph.nodes[name].get("pairs", 0) <= 2 for name in names)
    again = read_circuit(write_circuit(graph, tmp_path / "trace.graphml"))
    assert again.graph["firings"] == graph.graph["firings"]


def test_a_head_at_a_position_is_one_node_however_often_it_is_met() -> None:
    graph = nx.DiGraph()
    for name, kind in (
        ("1.2@end", "head"),
        ("1.2.q@end", "input"),
        ("1.2.k@S2", "input"),
        ("0.1@S2", "head"),
        ("embed@S2", "embed"),
    ):
        graph.add_node(name, kind=kind)
    graph.add_edge("1.2.q@end", "1.2@end", kind="inside")
    graph.add_edge("0.1@S2", "1.2.k@S2", kind="edge")
    graph.add_edge("embed@S2", "1.2.k@S2", kind="edge")
    assert statistics(graph) == {"head_nodes": 3, "edges": 2, "edges_from_heads": 1}


@pytest.fixture(scope="module")
def induction() -> hw.HookedModel:
    return hw.load(planted_models.induction(vocabulary=40, positions=64).model)


def repeated() -> torch.Tensor:
    words = torch.randperm(39, generator=torch.Generator().manual_seed(0))[:10] + 1
    return torch.cat([torch.zeros(1, dtype=torch.long), words, words[:4]])[None]


def test_the_planted_circuit_is_found_exactly(induction) -> None:
    """1.2 looks from 14 at 5, where 0.1 wrote which token stands at 4; nothing else sent anything."""
    graph = analyses.trace_signals(induction, repeated(), roots="1.2")
    edges = {(u, v) for u, v, kind in graph.edges(data="kind") if kind == "edge"}
    assert edges == {("0.1@5", "1.2.k@5")}
    assert graph.nodes["0.1.k@4"]["input"] == "k"  # 0.1 fires in turn
    graph = analyses.trace_signals(induction, repeated(), upstream="all")
    edges = {(u, v) for u, v, kind in graph.edges(data="kind") if kind == "edge"}
    assert edges == {
        ("0.1@5", "1.2.k@5"), ("embed@14", "1.2.q@14"), ("embed@14", "0.1.q@14"), ("embed@13", "0.1.k@13"),
        ("embed@5", "0.1.q@5"), ("embed@4", "0.1.k@4"),
    }  # fmt: skip


def test_edges_add_up_over_prompts(induction) -> None:
    """A second prompt without a repeat has no firing; names join positions of prompts of different lengths."""
    once = torch.arange(15)[None]
    longer = torch.cat([repeated(), repeated()[:, 5:6]], 1)
    names = lambda prompt, position: {5: "after", 6: "after"}.get(position, "other")  # noqa: E731
    graph = analyses.trace_signals(induction, torch.cat([repeated(), once]), roots=["1.2"])
    assert graph.edges["0.1@5", "1.2.k@5"]["count"] == 1
    one, two = (analyses.trace_signals(induction, ids, roots="1.2") for ids in (repeated(), longer[:, :16]))
    weights = [one.edges["0.1@5", "1.2.k@5"]["weight"], two.edges["0.1@6", "1.2.k@6"]["weight"]]
    tensor = torch.nn.functional.pad(repeated(), (0, 1))
    mask = (torch.arange(16) < torch.tensor([[15], [16]])).long()
    tokens = induction.to_tokens(torch.cat([tensor, longer[:, :16]]), mask)
    both = analyses.trace_signals(induction, tokens, roots="1.2", names=names)  # type: ignore[arg-type]
    edge = both.edges["0.1@after", "1.2.k@after"]
    assert edge["count"] == 2
    assert edge["weight"] == pytest.approx(sum(weights) / 2)
    assert edge["input"] == "k"
    again = nx.parse_graphml("\n".join(nx.generate_graphml(both)))
    assert again.graph["question"] == both.graph["question"]
    assert again.edges["0.1@after", "1.2.k@after"]["count"] == 2


def test_prompts_that_are_wrong_and_models_that_can_not_be_read(pairs, induction) -> None:
    with pytest.raises(HeadError, match=r"no such head: 7\.9"):
        analyses.trace_signals(induction, repeated(), roots="1.2 7.9")
    with pytest.raises(AnalysisError, match="position=15, but prompt 0 has 15 tokens"):
        analyses.trace_signals(induction, repeated(), position=15)
    with pytest.raises(AnalysisError, match="source holds 2 positions for 1 prompts"):
        analyses.trace_signals(induction, repeated(), source=[1, 2])
    with pytest.raises(AnalysisError, match="upstream='mlps' is unknown"):
        analyses.trace_signals(induction, repeated(), upstream="mlps")  # type: ignore[arg-type]
    with pytest.raises(AnalysisError, match="its edges are not known"):
        analyses.trace_signals(pairs("bert").model, IDS[None])
    empty = analyses.trace_signals(induction, torch.zeros(1, 1, dtype=torch.long))
    assert len(empty) == 0
    torch.manual_seed(0)
    config = hf.Qwen3Config(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=32,
    )  # fmt: skip
    with pytest.raises(AnalysisError, match="does more to its queries and keys than rotate them"):
        analyses.trace_signals(hw.load(hf.Qwen3ForCausalLM(config).eval()), IDS[None])
