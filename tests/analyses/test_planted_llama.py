"""In Llamas built by hand every circuit analysis finds the heads, the MLP and the edges that carry the answer, and no
others, amid heads and MLPs of small random weights.

An edge is found above a tenth of the largest score (a share of 0.2 in path patching). Mutations seen to fail: ACDC
keeping what costs little, circuit and complement exchanged, MLPs free where they were to be frozen, every point of
EAP-IG at the corrupt prompt, the heads of a shared key counted wrongly, and in the models one head that no longer
writes (`test_a_circuit_with_a_broken_edge_is_not_found`).
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from pathlib import Path

import networkx as nx
import planted_llama
import pytest
import torch
from torch import Tensor

import headwater as hw
from headwater import analyses
from headwater.analyses.circuits.circuit_faithfulness import read_circuit, write_circuit
from headwater.lens.errors import AnalysisError

pytestmark = pytest.mark.slow

Edges = set[tuple[str, str]]
KINDS = ("induction", "chain", "relation")


class Case:
    """A planted model, three pairs of prompts, and what must be answered to the clean and to the corrupt one."""

    def __init__(self, kind: str) -> None:
        self.planted = getattr(planted_llama, kind)()
        self.model = hw.load(self.planted.model)
        draw = torch.Generator().manual_seed(0)
        rows = [{"induction": repeat, "chain": words, "relation": fact}[kind](draw, n) for n in range(3)]
        self.clean, self.corrupt = (torch.stack([row[side] for row in rows]) for side in (0, 1))
        self.pairs = list(zip(self.clean, self.corrupt, strict=True))
        self.asked = {"answer": [f"#{row[2]}" for row in rows], "wrong": [f"#{row[3]}" for row in rows]}


def repeat(draw: torch.Generator, number: int) -> tuple[Tensor, Tensor, int, int]:
    """`<bos>`, eight words, and one of the first seven again; the corrupt prompt has eight others."""
    one, two = (torch.randperm(23, generator=draw) + 1)[:16].reshape(2, 8)
    here, there, start = number % 7, (5 * number + 3) % 7, torch.zeros(1, dtype=torch.long)
    texts = [torch.cat([start, side, side[at : at + 1]]) for side, at in ((one, here), (two, there))]
    return texts[0], texts[1], int(one[here + 1]), int(two[there + 1])


def words(draw: torch.Generator, _: int) -> tuple[Tensor, Tensor, int, int]:
    """Nine words, of which the fifth is the answer."""
    one, two = torch.randperm(24, generator=draw)[:18].reshape(2, 9)
    return one, two, int(one[4]), int(two[4])


def fact(draw: torch.Generator, _: int) -> tuple[Tensor, Tensor, int, int]:
    """A subject (tokens 1 to 5) somewhere among other words, and a relation (6 to 8) at the end."""
    who, asked, place = (torch.randperm(n, generator=draw)[:2] for n in (5, 3, 6))
    text = torch.randint(9, 17, (2, 8), generator=draw)
    text[:, 0], text[:, -1] = 0, 6 + asked
    text[[0, 1], 1 + place] = 1 + who
    first, second = (17 + 3 * who + asked).tolist()
    return text[0], text[1], first, second


@functools.cache
def case(kind: str) -> Case:
    return Case(kind)


@pytest.fixture(params=KINDS)
def given(request: pytest.FixtureRequest) -> Case:
    return case(request.param)


def edges_of(graph: nx.DiGraph) -> dict[tuple[str, str], float]:
    return {(u, v): d["score"] for u, v, d in graph.edges(data=True) if d["kind"] != "inside"}


def found(graph: nx.DiGraph) -> Edges:
    scores = edges_of(graph)
    return {edge for edge, score in scores.items() if score > max(scores.values()) / 10}


def heads_of(edges: Edges) -> set[str]:
    return {u for u, _ in edges} - {"embed"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("noise", [0.0, 0.01, 0.03])
def test_the_planted_models_answer(kind: str, noise: float) -> None:
    plain = getattr(planted_llama, kind)(noise=noise, seed=3).model
    told = case(kind)
    for texts, which in ((told.clean, "answer"), (told.corrupt, "wrong")):
        assert [f"#{token}" for token in plain(texts).logits[:, -1].argmax(-1).tolist()] == told.asked[which]


@pytest.mark.parametrize("level", ["edge", "node"])
def test_every_edge_run_by_itself(given: Case, level: str) -> None:
    """Without the edge the answer loses half or all of its lead (32 to 90 logits), any other edge 0.5 at most."""
    graph = analyses.edge_attribution(given.model, given.pairs, how="exact", level=level, **given.asked)
    if level == "node":
        scores = {node: d["score"] for node, d in graph.nodes(data=True) if "score" in d}
        assert {n for n, s in scores.items() if s > max(scores.values()) / 10} == given.planted.nodes - {
            "logits"
        }
        return
    scores = edges_of(graph)
    assert found(graph) == given.planted.edges
    assert min(scores[edge] for edge in given.planted.edges) > 30
    assert max(abs(score) for edge, score in scores.items() if edge not in given.planted.edges) < 1


def shared(edges: Iterable[tuple[str, str]]) -> Edges:
    """The edges with the inputs that two heads share in the place of their own."""

    def name(receiver: str) -> str:
        layer, _, rest = receiver.partition(".")
        head, _, kind = rest.partition(".")
        return f"{layer}.kv{int(head) // 2}.{kind}" if kind in ("k", "v") else receiver

    return {(sender, name(receiver)) for sender, receiver in edges}


def test_edges_of_shared_keys(given: Case) -> None:
    """With an input per KV head the same edges end in the group's key and value."""
    graph = analyses.edge_attribution(given.model, given.pairs, how="exact", key_values="kv", **given.asked)
    assert found(graph) == shared(given.planted.edges)


@pytest.mark.parametrize(("how", "steps"), [("inputs", 10), ("activations", 5)])
def test_eap_ig(given: Case, how: str, steps: int) -> None:
    """Precision and recall 1.0, but for one edge of "relation" that no slope shows: while the softmax is undecided
    between the two subjects, half a subject is too little for the neuron, and the other way round."""
    hidden = {("embed", "0.3.k")} if given is case("relation") else set()
    graph = analyses.edge_attribution(given.model, given.pairs, how=how, steps=steps, **given.asked)
    assert found(graph) == given.planted.edges - hidden
    assert heads_of(found(graph)) == heads_of(given.planted.edges)
    for edge in hidden:
        assert abs(edges_of(graph)[edge]) < 1


@pytest.mark.parametrize(("metric", "tau"), [("kl", 0.5), ("measure", 5.0)])
def test_acdc(given: Case, metric: str, tau: float) -> None:
    graph = analyses.acdc(given.model, given.pairs, tau=tau, metric=metric, **given.asked)
    assert set(edges_of(graph)) == given.planted.edges


def test_acdc_of_shared_keys() -> None:
    told = case("induction")
    graph = analyses.acdc(told.model, told.pairs, tau=5.0, metric="measure", key_values="kv", **told.asked)
    assert set(edges_of(graph)) == shared(told.planted.edges)
    assert {v for u, v in graph.edges if u == "1.kv1.k"} == {"1.2"}  # 1.3 leads nowhere


@pytest.mark.parametrize(("mlps", "how"), [("frozen", "noise"), ("free", "denoise")])
def test_path_patching(given: Case, mlps: str, how: str) -> None:
    """Every sender to every receiver. With free MLPs, what goes through MLP 1 reaches the logits too."""
    layers = given.model.hf.config.num_hidden_layers
    inputs = [f"{layer}.{head}.{kind}" for layer in range(layers) for head in range(4) for kind in "qkv"]
    seen = set()
    for receiver in [*inputs, "logits"]:
        effect = analyses.path_patch(
            given.model, given.clean, given.corrupt, receivers=receiver, mlps=mlps, how=how,
            per="query_head", **given.asked,
        )  # fmt: skip
        shares = dict(zip(effect.coords["sender"].values.tolist(), effect.mean("batch").values, strict=True))
        seen |= {(sender, receiver) for sender, share in shares.items() if share > 0.2}
        assert all(share > 0.2 or abs(share) < 0.02 for share in shares.values())
    to_mlp = {(u, v) for u, v in given.planted.edges if v == "mlp.1"}
    through = {(u, "logits") for u, _ in to_mlp} if mlps == "free" else set()
    assert seen == (given.planted.edges - to_mlp) | through


def test_the_circuit_is_all_it_takes(given: Case, tmp_path) -> None:
    """Faithfulness within 0.02 of 1 and completeness within 0.02 of 0, also from a file; without any one edge less
    than 0.6."""
    whole = analyses.edge_attribution(given.model, given.pairs, how="exact", **given.asked)
    inside = [(u, v) for u, v, d in whole.edges(data=True) if d["kind"] == "inside"]
    circuit = whole.edge_subgraph([*given.planted.edges, *inside]).copy()
    write_circuit(circuit, tmp_path / "circuit.graphml")
    for graph in (circuit, read_circuit(tmp_path / "circuit.graphml"), tmp_path / "circuit.graphml"):
        result = analyses.circuit_faithfulness(given.model, graph, given.pairs, draws=10, **given.asked)
        assert result["mean"].sel(score="faithfulness").values == pytest.approx(1, abs=0.02)
        assert result["mean"].sel(score="completeness").values == pytest.approx(0, abs=0.02)
    for edge in given.planted.edges:
        broken = circuit.copy()
        broken.remove_edge(*edge)
        result = analyses.circuit_faithfulness(given.model, broken, given.pairs, draws=10, **given.asked)
        assert (result["mean"].sel(score="faithfulness").values < 0.6).all(), edge


def signals(kind: str, root: str) -> list[tuple[dict[tuple[str, str], float], nx.DiGraph]]:
    told = case(kind)
    graphs = [analyses.trace_signals(told.model, text[None], roots=root) for text in told.clean]
    weights = [{(u, v): d["weight"] for u, v, d in g.edges(data=True) if d["kind"] == "edge"} for g in graphs]
    return list(zip(weights, graphs, strict=True))


def test_signals_lead_to_the_head_that_wrote_the_key() -> None:
    """1.2 looks from the end at the answer's place, because of what 0.1 wrote there. Each input's largest contributions
    are edges whatever their size, so that noise is traced into the query; it has a tenth of the weight at most."""
    for number, (weights, graph) in enumerate(signals("induction", "1.2")):
        answer = number % 7 + 2
        strong = {edge for edge, weight in weights.items() if weight > max(weights.values()) / 10}
        assert strong == {(f"0.1@{answer}", f"1.2.k@{answer}")}
        assert weights[next(iter(strong))] == pytest.approx(graph.nodes[f"1.2.k@{answer}"]["total"], rel=0.1)


def test_heads_that_move_values_are_no_signals() -> None:
    """In the chain every head looks where it does for its place alone: what heads give to that is noise."""
    least = min(max(weights.values()) for weights, _ in signals("induction", "1.2"))
    for weights, _ in signals("chain", "2.1"):
        assert all(abs(weight) < least / 10 for weight in weights.values())


def test_a_circuit_with_a_broken_edge_is_not_found() -> None:
    """The tests above can fail: without what 0.0 writes, the chain's edges are no longer those that were planted."""
    planted = planted_llama.chain()
    planted.model.model.layers[0].self_attn.o_proj.weight[:, :64] = 0
    told = case("chain")
    graph = analyses.edge_attribution(hw.load(planted.model), told.pairs, how="exact", **told.asked)
    assert found(graph) != planted.edges


@pytest.mark.parametrize(
    ("message", "asked"),
    [
        ("sizes='few' is not a list of whole numbers", {"sizes": "few"}),
        ("sizes is empty", {"sizes": []}),
        (r"sizes=\[2\.5\] is not a list of whole numbers", {"sizes": [2.5]}),
        ("draws=0 is outside its limits", {"draws": 0}),
    ],
)
def test_sizes_and_draws_that_can_not_be_asked(message: str, asked: dict) -> None:
    told = case("induction")
    with pytest.raises(AnalysisError, match=message):
        analyses.circuit_faithfulness(told.model, None, told.pairs, **asked, **told.asked)


@pytest.mark.parametrize("score", [float("nan"), "much"])
def test_scores_that_are_no_numbers(score: float | str) -> None:
    told = case("induction")
    graph = nx.DiGraph([("embed", "logits", {"score": score, "kind": "edge"})])
    with pytest.raises(AnalysisError, match=r"the score of embed → logits is .*; give finite numbers"):
        analyses.circuit_faithfulness(told.model, graph, told.pairs, sizes=1, **told.asked)


@pytest.mark.parametrize("given", [nx.Graph(), {}, 3])
def test_what_is_no_circuit(given: object) -> None:
    told = case("induction")
    with pytest.raises(
        AnalysisError, match=r"a circuit is a networkx.DiGraph, or a file of write_circuit; got"
    ):
        analyses.circuit_faithfulness(told.model, given, told.pairs, **told.asked)


def test_half_precision_is_named_as_the_reason() -> None:
    """In bfloat16 the parts do not add up to three digits, and the line says what to do about it."""
    told = case("induction")
    model = hw.load(planted_llama.induction().model.bfloat16())
    for ask in (
        lambda: analyses.edge_attribution(model, told.pairs, **told.asked),
        lambda: analyses.direct_logit_attribution(model, told.clean, answer=told.asked["answer"]),
        lambda: analyses.trace_signals(model, told.clean, roots="1.2"),
    ):
        with pytest.raises(
            AnalysisError, match=r"it runs in bfloat16, whose rounding may be why: load it in float32"
        ):
            ask()


WAYS = {
    "EAP": {"steps": 1}, "EAP-IG inputs": {"steps": 5}, "both ends": {"how": "clean_corrupt"},
    "EAP-IG activations": {"how": "activations_released"}, "exact": {"how": "exact"},
}  # fmt: skip
PAGE = Path(__file__).parents[2] / "docs" / "analyses" / "circuits.md"


def test_the_area_below_the_roc_is_that_of_the_page() -> None:
    """Every method ranks the planted edges above the others; the best of the benchmark has .81 on its own model."""
    text = PAGE.read_text(encoding="utf-8")
    for name, asked in WAYS.items():
        areas = []
        for kind in KINDS:
            told = case(kind)
            graph = analyses.edge_attribution(told.model, told.pairs, draws=1, **asked, **told.asked)
            areas.append(area(told, graph))
        assert min(areas) > 0.81
        assert f"| {name} | {' | '.join(f'{area:.2f}' for area in areas)} |" in text
    routes = [
        area(case(kind), analyses.information_flow_routes(case(kind).model, case(kind).clean))
        for kind in KINDS
    ]
    assert f"| information flow routes | {' | '.join(f'{each:.2f}' for each in routes)} |" in text


def area(told: Case, graph: nx.DiGraph) -> float:
    known = graph.copy()
    known.remove_edges_from(set(edges_of(graph)) - told.planted.edges)
    found = analyses.circuit_curve(told.model, graph, told.pairs, known=known, draws=1, **told.asked)
    return float(found.auroc.sel(choice="greedy"))
