"""analyses/circuits/_exact_edges.py and _finished_scores.py: edges drawn at random, the estimate of time, and resuming.

Mutations seen to fail: the draw without its seed, scores of edges that were not drawn, a piece under another batch's
name, a measure that is not compared.
"""

from __future__ import annotations

import json

import pytest
import torch
from limits import lower

import headwater as hw
from headwater import analyses
from headwater.analyses.circuits._graphs import edges_of
from headwater.lens.errors import AnalysisError
from headwater.lens.loading import zoo
from headwater.lens.progress import telling


class Stopped(Exception):
    pass


def measure(logits: torch.Tensor) -> torch.Tensor:
    return logits[:, -1, 7] - logits[:, -1, 11]


def measure_of_others(logits: torch.Tensor) -> torch.Tensor:
    return logits[:, -1, 8] - logits[:, -1, 11]


@pytest.fixture(scope="module")
def model() -> hw.HookedModel:
    return hw.load(zoo.build("gpt2").double())


def pairs() -> list:
    """Pairs of two lengths, so that there are several batches."""
    generator = torch.Generator().manual_seed(2)
    return [tuple(torch.randint(3, 90, (2, n), generator=generator)) for n in (6, 4, 4)]


def told(graph) -> dict:
    return {(u, v): about for u, v, about in graph.edges(data=True) if "score" in about}


def test_a_sample_has_the_scores_of_all_edges_and_the_rest_has_none(model) -> None:
    given = {"measure": measure, "how": "exact", "draws": 50}
    whole, some, other = (
        analyses.edge_attribution(model, pairs(), **given, sample=sample, seed=seed)
        for sample, seed in ((None, 4), (9, 4), (9, 5))
    )
    every, drawn = told(whole), told(some)
    assert len(drawn) == 9
    assert set(drawn) != set(told(other))
    assert set(edges_of(some)) == set(edges_of(whole)) == set(every)
    for edge, about in drawn.items():
        assert about["score"] == pytest.approx(every[edge]["score"], abs=1e-12)
        assert (about["low"], about["high"]) == pytest.approx(
            (every[edge]["low"], every[edge]["high"]), abs=1e-12
        )
    assert all("low" not in some.edges[edge] for edge in set(every) - set(drawn))
    assert set(told(analyses.edge_attribution(model, pairs(), **given, sample=9, seed=4))) == set(drawn)
    assert len(told(analyses.edge_attribution(model, pairs(), **given, sample=10**6))) == len(every)
    circuit = analyses.select_circuit(some, 10**6)
    assert set(edges_of(circuit)) <= set(drawn)
    nodes = analyses.edge_attribution(model, pairs(), **given, level="node", sample=3)
    assert sum("score" in about for _, about in nodes.nodes(data=True)) == 3


def test_a_long_run_says_before_how_long_it_takes(model, monkeypatch) -> None:
    heard: list[tuple] = []
    lower(monkeypatch, "analyses.circuits._exact_edges", SOON=0.0, ROWS=4)
    with telling(lambda *step: heard.append(step)):
        analyses.edge_attribution(model, pairs(), measure=measure, how="exact", sample=9)
    words, done, of, unit = heard[0]
    assert words.startswith("9 edges one by one, about ")
    assert words.endswith(" seconds")
    assert (done, of, unit) == (0, 8, "run")  # 5 runs of 2 copies of two pairs, 3 of 4 copies of one
    lower(monkeypatch, "analyses.circuits._exact_edges", MOST=8)
    with pytest.raises(
        AnalysisError, match=r"runs each of them, about \d+ seconds on this machine; it takes 8 at"
    ):
        analyses.edge_attribution(model, pairs(), measure=measure, how="exact")


@pytest.mark.parametrize("how", ["exact", "inputs"])
def test_a_run_that_was_stopped_goes_on(model, how, tmp_path, monkeypatch) -> None:
    lower(monkeypatch, "analyses.circuits._exact_edges", ROWS=8)
    exact = {"sample": 9} if how == "exact" else {}
    given = {"measure": measure, "how": how, "steps": 2, "batch_size": 1, "draws": 20, **exact}
    expected = analyses.edge_attribution(model, pairs(), **given)
    file, passes, limit = tmp_path / "run.jsonl", [0], [4]

    def check() -> None:
        passes[0] += 1
        if passes[0] > limit[0]:
            raise Stopped

    def heard(*step) -> None:
        pass

    def run(at_most: float):
        passes[0], limit[0] = 0, at_most
        with telling(heard, check):
            return analyses.edge_attribution(model, pairs(), **given, resume=file)

    run_whole = run(10**9) and passes[0]
    file.unlink()
    for part in (0.6, 0.1):  # the second is stopped while it computes again what is not kept
        with pytest.raises(Stopped):
            run(int(part * run_whole))
    assert len(file.read_text().splitlines()) > 1
    found = run(10**9)
    assert passes[0] < run_whole  # finished pieces did not run again
    assert dict(found.edges) == dict(expected.edges)  # to the last bit
    again = run(10**9)
    assert dict(again.edges) == dict(expected.edges)

    other = {**given, "measure": measure_of_others}
    with pytest.raises(AnalysisError, match="of another run"):
        analyses.edge_attribution(model, pairs(), **other, resume=file)
    measure_of_others.__name__ = "measure"
    with pytest.raises(AnalysisError, match="other values of the measure"):
        analyses.edge_attribution(model, pairs(), **other, resume=file)
    measure_of_others.__name__ = "measure_of_others"
    with pytest.raises(AnalysisError, match=r"resume: .* is of another run"):
        analyses.edge_attribution(model, pairs()[:2], **given, resume=file)
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join([*lines[:-1], lines[-1].replace("a", "b", 1)]))
    with pytest.raises(AnalysisError, match="was changed in line"):
        analyses.edge_attribution(model, pairs(), **given, resume=file)
    assert json.loads(lines[0])  # text, a line for each piece


def test_settings_without_a_meaning_are_refused(model) -> None:
    with pytest.raises(AnalysisError, match="sample=3 has no meaning"):
        analyses.edge_attribution(model, pairs(), measure=measure, sample=3)
    with pytest.raises(AnalysisError, match="sample=0 is outside"):
        analyses.edge_attribution(model, pairs(), measure=measure, how="exact", sample=0)
