"""Edges against a dense float64 run of every edge by itself, and against circuits whose edges are known.

Mutations seen to fail: the corrupt and the clean value exchanged, the norm in front of an input left out, the MLP of
a parallel block reading its own layer's heads, the interpolation turned round, steps counted from 0, the scale of the
norm behind the heads forgotten.
"""

from __future__ import annotations

import copy
import functools
import gc
import weakref

import edge_oracle
import planted_models
import pytest
import torch
import transformers as hf

import headwater as hw
from headwater import analyses
from headwater.analyses._streams import component_graph
from headwater.analyses.circuits._graphs import edges_of
from headwater.lens.errors import HeadwaterError
from headwater.lens.loading import zoo

MODELS = ("gpt2", "llama", "gemma2", "gpt_neox")
POSITION = 5


@functools.cache
def models(name: str) -> tuple[hw.HookedModel, hf.PreTrainedModel]:
    plain = zoo.build(name)
    twin = copy.deepcopy(plain).double()
    twin.set_attn_implementation("eager")
    model = hw.load(plain)  # Gemma's own rows of padding are NaN in float64
    model.hf.double()
    return model, twin


@functools.cache
def prompts() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 90, (2, 2, 6), generator=generator)
    return ids[0], ids[1]


def pairs() -> list[tuple[torch.Tensor, torch.Tensor]]:
    return list(zip(*prompts(), strict=True))


def measure(logits: torch.Tensor) -> torch.Tensor:
    return logits[:, POSITION, 7] - logits[:, POSITION, 11]


def scores_of(graph) -> dict[tuple[str, str], float]:
    return {edge: graph.edges[edge]["score"] for edge in edges_of(graph)}


def oracle_scores(told, nodes, other, points) -> dict[tuple[str, str], float]:
    """Mean over points of the gradient at each input, times what each sender loses; `told` runs at a point."""
    slopes: dict[str, torch.Tensor] = {}
    for point in points:
        found = told(point)
        grads = torch.autograd.grad(measure(found.logits).sum(), list(found.leaves.values()))
        for name, grad in zip(found.leaves, grads, strict=True):
            slopes[name] = slopes.get(name, 0) + grad / len(points)
    lost = {name: (said - other[name]).detach() for name, said in nodes.items()}
    return {(u, v): float((lost[u] * slopes[v]).sum() / 2) for u, v in found.edges}


def agree(found: dict, expected: dict) -> None:
    assert set(found) == set(expected)
    largest = max(abs(value) for value in expected.values())
    for edge, value in expected.items():
        assert found[edge] == pytest.approx(value, rel=1e-5, abs=1e-7 * largest), edge


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("key_values", ["head", "kv"])
def test_gradients_are_those_of_the_dense_run(name: str, key_values) -> None:
    if key_values == "kv" and name in ("gpt2", "gpt_neox"):
        pytest.skip("every head has keys of its own")
    model, twin = models(name)
    clean, corrupt = prompts()
    run = functools.partial(edge_oracle.run, twin, clean, kv=key_values == "kv")
    nodes, other = run().nodes, edge_oracle.run(twin, corrupt).nodes
    # the oracle is the model, which takes norms and softmaxes in float32
    torch.testing.assert_close(run().logits, twin(clean).logits, atol=2e-6, rtol=0)
    apart = nodes["embed"] - other["embed"]
    settings = {
        "eap": ({"steps": 1}, [1.0]),
        "inputs": ({"steps": 3}, [0.0, 1 / 3, 2 / 3]),
        "clean_corrupt": ({"how": "clean_corrupt"}, [0.0, 1.0]),
    }
    for asked, points in settings.values():
        graph = analyses.edge_attribution(model, pairs(), measure=measure, key_values=key_values, **asked)
        expected = oracle_scores(lambda a: run(embed=other["embed"] + a * apart), nodes, other, points)
        agree(scores_of(graph), expected)


@pytest.mark.parametrize("name", MODELS)
def test_every_edge_patched_is_the_dense_run(name: str) -> None:
    model, twin = models(name)
    clean, corrupt = prompts()
    with torch.no_grad():
        plain, other = edge_oracle.run(twin, clean), edge_oracle.run(twin, corrupt).nodes
        picked = [*plain.edges[:: len(plain.edges) // 15], ("0.1", "logits"), ("0.2", "1.3.v")]
        expected = {}
        for edge in picked:
            now = edge_oracle.run(twin, clean, other, {edge})
            expected[edge] = float((measure(plain.logits) - measure(now.logits)).mean())
    found = scores_of(analyses.edge_attribution(model, pairs(), measure=measure, how="exact"))
    agree({edge: found[edge] for edge in expected}, expected)


@pytest.mark.parametrize("how", ["mean", "zero"])
def test_what_a_changed_edge_carries(how) -> None:
    model, twin = models("llama")
    clean, corrupt = prompts()
    with torch.no_grad():
        plain, other = edge_oracle.run(twin, clean), edge_oracle.run(twin, corrupt).nodes
        for name, said in other.items():
            other[name] = torch.zeros_like(said) if how == "zero" else said.mean((0, 1)).expand_as(said)
        edge = ("0.1", "1.2.v")
        expected = measure(plain.logits) - measure(edge_oracle.run(twin, clean, other, {edge}).logits)
    found = scores_of(analyses.edge_attribution(model, pairs(), measure=measure, how="exact", ablation=how))
    assert found[edge] == pytest.approx(float(expected.mean()), rel=1e-6)


def test_activations_are_moved_one_place_at_a_time() -> None:
    """For edges out of the embedding it is the same as moving the inputs; for those of the last MLP a closed form."""
    model, twin = models("gpt2")
    by_input, by_activation = (
        scores_of(analyses.edge_attribution(model, pairs(), measure=measure, steps=2, how=how))
        for how in ("inputs", "activations")
    )
    for edge, score in by_input.items():
        if edge[0] == "embed":
            assert by_activation[edge] == pytest.approx(score, rel=1e-9, abs=1e-12)
    clean, corrupt = prompts()
    nodes, other = edge_oracle.run(twin, clean).nodes, edge_oracle.run(twin, corrupt).nodes
    apart = (nodes["mlp.1"] - other["mlp.1"]).detach()
    total = sum(value for name, value in nodes.items() if name != "mlp.1").detach()
    bias = sum(block.attn.c_proj.bias for block in twin.transformer.h).detach()
    score = 0.0
    for k in (0, 1):
        said = (other["mlp.1"].detach() + k / 2 * apart).requires_grad_()
        logits = twin.lm_head(twin.transformer.ln_f(total + bias + said))
        (slope,) = torch.autograd.grad(measure(logits).sum(), said)
        score += float((apart * slope).sum()) / 2 / 2
    assert by_activation["mlp.1", "logits"] == pytest.approx(score, rel=1e-6)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_activations_as_released_move_every_site_for_every_edge(name: str) -> None:
    """Written like the authors' loop: sites, steps from 1 on, and the gradients of all edges each time."""
    model, twin = models(name)
    clean, corrupt = prompts()
    nodes, other = (
        {node: said.detach() for node, said in edge_oracle.run(twin, ids).nodes.items()}
        for ids in (clean, corrupt)
    )
    heads = [[f"{layer}.{head}" for head in range(4)] for layer in range(2)]
    sites, steps = [["embed"], heads[0], ["mlp.0"], heads[1], ["mlp.1"]], 2
    total: dict[tuple[str, str], float] = {}
    for site in sites:
        for k in range(1, steps + 1):
            said = {node: other[node] + k / steps * (nodes[node] - other[node]) for node in site}
            found = edge_oracle.run(twin, clean, embed=said.pop("embed", None), said=said)
            grads = torch.autograd.grad(
                measure(found.logits).sum(), list(found.leaves.values()), materialize_grads=True
            )
            slope = dict(zip(found.leaves, grads, strict=True))
            for u, v in found.edges:
                total[u, v] = total.get((u, v), 0) + float(((nodes[u] - other[u]) * slope[v]).sum())
    expected = {edge: score / (len(sites) * steps) / len(clean) for edge, score in total.items()}
    asked = {"measure": measure, "how": "activations_released", "steps": steps}
    agree(scores_of(analyses.edge_attribution(model, pairs(), **asked)), expected)
    ours = scores_of(
        analyses.edge_attribution(model, pairs(), measure=measure, how="activations", steps=steps)
    )
    largest = max(map(abs, expected.values()))
    assert max(abs(ours[edge] - score) for edge, score in expected.items()) > 0.02 * largest


@pytest.mark.parametrize("name", ["gpt2", "gemma2"])
def test_a_node_is_worth_what_it_says_to_all(name: str) -> None:
    """Its slope is the sum of its edges' slopes; patched, it is all of its edges at once."""
    model, twin = models(name)
    edges = scores_of(analyses.edge_attribution(model, pairs(), measure=measure, steps=1))
    nodes = analyses.edge_attribution(model, pairs(), measure=measure, steps=1, level="node")
    for node in ("embed", "0.1", "mlp.0", "1.3", "mlp.1"):
        total = sum(score for (u, _), score in edges.items() if u == node)
        assert nodes.nodes[node]["score"] == pytest.approx(total, rel=1e-6, abs=1e-9)
    clean, corrupt = prompts()
    with torch.no_grad():
        plain, other = edge_oracle.run(twin, clean), edge_oracle.run(twin, corrupt).nodes
        out = {edge for edge in plain.edges if edge[0] == "0.1"}
        now = edge_oracle.run(twin, clean, other, out)
    exact = analyses.edge_attribution(model, pairs(), measure=measure, how="exact", level="node")
    expected = float((measure(plain.logits) - measure(now.logits)).mean())
    assert exact.nodes["0.1"]["score"] == pytest.approx(expected, rel=1e-6)


def linear_model() -> hw.HookedModel:
    """A GPT-2 without norms, with even attention and without MLPs: its logits are linear in its input."""
    torch.manual_seed(2)
    config = hf.GPT2Config(vocab_size=30, n_embd=8, n_layer=2, n_head=2, n_positions=16)
    plain = hf.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for block in plain.transformer.h:
            block.ln_1, block.ln_2 = torch.nn.Identity(), torch.nn.Identity()
            block.attn.c_attn.weight[:, :16] = 0
            block.attn.c_attn.bias[:16] = 0
            block.mlp.c_proj.weight.zero_()
            for matrix in (block.attn.c_attn.weight, block.attn.c_proj.weight, plain.transformer.wte.weight):
                matrix *= 20
    plain.transformer.ln_f = torch.nn.Identity()
    return hw.load(plain.double())


def test_in_a_linear_model_a_slope_is_the_effect() -> None:
    model = linear_model()
    given = [(torch.tensor([3, 9, 4, 1]), torch.tensor([3, 2, 8, 1]))]
    exact = scores_of(analyses.edge_attribution(model, given, how="exact"))
    assert max(map(abs, exact.values())) > 0.1
    for asked in ({"steps": 1}, {"steps": 4}, {"how": "activations"}, {"how": "clean_corrupt"}):
        found = scores_of(analyses.edge_attribution(model, given, **asked))
        for edge, value in exact.items():
            assert found[edge] == pytest.approx(value, abs=1e-9), (asked, edge)


@functools.cache
def induction() -> tuple[planted_models.Planted, hw.HookedModel, tuple, list[int], list[int]]:
    """The planted model, texts whose first copy is corrupt, the tokens that follow and one that does not."""
    planted = planted_models.induction(vocabulary=40, positions=24)
    generator = torch.Generator().manual_seed(0)
    found, right, wrong = [], [], []
    for _ in range(6):
        drawn = torch.randperm(39, generator=generator)[:12] + 1
        first, other, start = drawn[:6], drawn[6:], torch.zeros(1, dtype=torch.long)
        found.append((torch.cat([start, first, first[:3]]), torch.cat([start, other, first[:3]])))
        right.append(int(first[3]))
        wrong.append(int(first[1]))
    return planted, hw.load(planted.model), tuple(found), right, wrong


@pytest.mark.parametrize(("how", "steps", "least"), [("exact", 1, 1.0), ("inputs", 50, 0.1)])
def test_the_planted_circuit_is_found_exactly(how, steps: int, least: float) -> None:
    """Precision and recall 1.0 with changed edges carrying means: every true edge scores more than 60 (exact) or 0.2
    (EAP-IG with 50 steps; sharp attention has a slope on a short part of the way alone), every other one below 0.05."""
    planted, model, given, right, wrong = induction()
    graph = analyses.edge_attribution(
        model, given, answer=right, wrong=wrong, how=how, steps=steps, ablation="mean"
    )
    found = {edge for edge, score in scores_of(graph).items() if score > least}
    assert found == planted.edges


@pytest.mark.parametrize(("how", "steps"), [("exact", 1), ("inputs", 5)])
def test_corrupt_tokens_show_the_edges_that_carry_tokens(how, steps: int) -> None:
    """Prompts of equal length have the same positions, so edges that carry positions or the last token stay unseen.
    Precision and recall are 1.0 for the other four at a tenth of the largest score."""
    _, model, given, right, wrong = induction()
    scores = scores_of(
        analyses.edge_attribution(model, given, answer=right, wrong=wrong, how=how, steps=steps)
    )
    found = {edge for edge, score in scores.items() if score > max(scores.values()) / 10}
    assert found == {("embed", "0.1.v"), ("0.1", "1.2.k"), ("embed", "1.2.v"), ("1.2", "logits")}


def test_prompts_of_unequal_length_and_batches_change_nothing() -> None:
    model, _ = models("llama")
    texts = [*pairs(), (torch.tensor([4, 5, 6]), torch.tensor([4, 8, 6]))]
    answers = {"answer": [7, 8, 9], "wrong": [11, 12, 13]}
    whole = scores_of(analyses.edge_attribution(model, texts, steps=2, **answers))
    single = scores_of(analyses.edge_attribution(model, texts, steps=2, batch_size=1, **answers))
    parts = [
        scores_of(analyses.edge_attribution(model, [text], steps=2, answer=[a], wrong=[w]))
        for text, a, w in zip(texts, answers["answer"], answers["wrong"], strict=True)
    ]
    for edge, score in whole.items():
        assert single[edge] == pytest.approx(score, abs=1e-9)
        assert sum(part[edge] for part in parts) / 3 == pytest.approx(score, abs=1e-9)


def test_a_run_with_gradients_is_gone_when_it_is_over(monkeypatch) -> None:
    """Without waiting for the collector of circles, which would let the graphs of many runs pile up."""
    model, _ = models("llama")
    alive: list[weakref.ref] = []
    made = component_graph.Passage.__init__

    def noted(passage, *given) -> None:
        made(passage, *given)
        alive.append(weakref.ref(passage))

    monkeypatch.setattr(component_graph.Passage, "__init__", noted)
    gc.collect()
    gc.disable()
    try:
        analyses.edge_attribution(model, pairs(), measure=measure, steps=2)
        assert len(alive) > 4
        assert all(each() is None for each in alive)
    finally:
        gc.enable()


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"how": "up"}, "how='up' is unknown"),
        ({"level": "up"}, "level='up' is unknown"),
        ({"ablation": "up"}, "ablation='up' is unknown"),
        ({"key_values": "up"}, "key_values='up' is unknown"),
        ({"measure": "up"}, "measure='up' is unknown"),
        ({"steps": 0}, "steps=0 is outside its limits; give a whole number from 1 to 1000"),
        ({"pairs": []}, "pairs is empty"),
        (
            {"pairs": [(torch.tensor([1, 2]), torch.tensor([1, 2, 3]))]},
            "pair 0 has 2 clean and 3 corrupt tokens",
        ),
        ({"pairs": [("one", "two", "three")]}, "pair 0 is not"),
        ({"pairs": ["one two"]}, "corrupt is missing"),
    ],
)
def test_refuses_what_makes_no_sense(asked, message: str) -> None:
    model, _ = models("gpt2")
    with pytest.raises(HeadwaterError, match=message):
        analyses.edge_attribution(**{"model": model, "pairs": pairs()} | asked)


@pytest.mark.parametrize("name", ["bloom", "deepseek_v3", "phi3", "bert"])
def test_refuses_models_that_it_can_not_take_apart(name: str) -> None:
    model = hw.load(zoo.build(name))
    with pytest.raises(HeadwaterError):
        analyses.edge_attribution(model, pairs(), measure=measure, steps=1)


def test_refuses_to_read_edges_under_edits() -> None:
    model, _ = models("gpt2")
    with model.edit(hw.ScaleHeads({"0.1": 0.0})), pytest.raises(HeadwaterError, match="edits are on"):
        analyses.edge_attribution(model, pairs(), measure=measure)
