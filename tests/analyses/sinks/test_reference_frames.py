"""Reference frames against dense formulas on eager float64 maps, closed forms, and graphs whose topology is known.

Mutations seen to fail: shares not divided by the queries that see, KL without the log of the visible count, the first
eigenvalue for the second, triangles not filled.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

import headwater as hw
from headwater.analyses.sinks import _graph_measures as graphs
from headwater.analyses.sinks.reference_frames import reference_frames
from headwater.lens.errors import AnalysisError


def dense(maps: torch.Tensor, real: np.ndarray, causal: bool) -> dict[str, float]:
    """The formulas on one text's mean map [query, key] in float64, written out."""
    place = np.flatnonzero(real)
    a = maps.numpy()[np.ix_(place, place)]
    n = len(place)
    seen = np.arange(n, 0, -1) if causal else np.full(n, n)
    c = a.sum(0) / seen
    judged = seen >= 3
    c = np.where(judged, c, 0)
    top = c.argmax()
    rows = a / a.sum(1, keepdims=True)
    visible = np.arange(1, n + 1) if causal else np.full(n, n)
    kl = [(r[r > 0] * np.log(r[r > 0] * v)).sum() for r, v in zip(rows, visible, strict=True)]
    without = [-np.log(1 - r[top]) for r in rows if r[top] < 1]
    w = (a + a.T) / 2
    np.fill_diagonal(w, 0)
    values = np.sort(np.linalg.eigvalsh(np.diag(w.sum(1)) - w))
    return {
        "top": place[top],
        "concentration": c.max(),
        "centralisation": (c.max() - c[judged]).sum() / (judged.sum() - 1),
        "kl_uniform": np.mean(kl),
        "kl_without_sink": np.mean(without),
        "fiedler": values[1],
        "gap": values[-1] - values[-2],
        "sinks": sum(((a[:, j] >= 0.2).sum() / seen[j] >= 0.4) and judged[j] for j in range(n)),
    }


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert"])
def test_matches_the_formulas(pairs, batch, name: str) -> None:
    ids, mask = batch
    pair = pairs(name)
    found = reference_frames(pair.model.record(ids, attention_mask=mask), tau=0.2, gamma=0.4)
    maps = pair.maps(ids, mask).mean(2)
    for layer in range(3):
        for b, real in enumerate(mask.bool().numpy()):
            expected = dense(maps[layer, b], real, pair.causal)
            for key, value in expected.items():
                assert found[key].values[b, layer] == pytest.approx(value, abs=2e-5), (key, layer, b)


def test_a_pure_sink_is_a_centralised_frame(pure_sink: hw.HookedModel) -> None:
    ids = torch.randint(3, 61, (1, 10), generator=torch.Generator().manual_seed(0))
    found = reference_frames(pure_sink.record(ids)).isel(batch=0)
    assert (found.frame == "centralised").all()
    np.testing.assert_allclose(found.concentration, 1, atol=1e-5)
    np.testing.assert_allclose(found.centralisation, 1, atol=1e-5)
    np.testing.assert_allclose(found.received_entropy, 0, atol=1e-4)
    # the row of n keys lies ln n from uniform
    np.testing.assert_allclose(found.kl_uniform, np.log(np.arange(1, 11)).mean(), atol=1e-5)
    # a star whose edges weigh one half: eigenvalues 0, 1/2 (n - 2 times) and n/2
    np.testing.assert_allclose(found.fiedler, 0.5, atol=1e-5)
    np.testing.assert_allclose(found.gap, 4.5, atol=1e-5)
    np.testing.assert_allclose(found.alignment, 2**-0.5, atol=1e-5)


def test_uniform_attention_has_no_frame(uniform: hw.HookedModel) -> None:
    ids = torch.randint(3, 61, (1, 12), generator=torch.Generator().manual_seed(0))
    found = reference_frames(uniform.record(ids)).isel(batch=0)
    assert (found.frame == "none").all()
    np.testing.assert_allclose(found.kl_uniform, 0, atol=1e-6)
    np.testing.assert_allclose(found.concentration, sum(1 / n for n in range(1, 13)) / 12, atol=1e-6)


def both_ends(pairs, amount: float, ids: torch.Tensor) -> hw.Record:
    pattern = torch.zeros(ids.shape[1], ids.shape[1])
    pattern[:, 0], pattern[:, -1] = amount, 1 - amount
    model = pairs("bert").model
    with model.edit(hw.InjectPattern(pattern.tolist())):
        return model.record(ids)


@pytest.mark.parametrize(
    ("amount", "frame"), [(0.5, "bidirectional"), (0.65, "bidirectional"), (0.8, "centralised")]
)
def test_both_ends_make_a_bidirectional_frame(pairs, amount: float, frame: str) -> None:
    ids = torch.randint(3, 61, (1, 9), generator=torch.Generator().manual_seed(1))
    found = reference_frames(both_ends(pairs, amount, ids), tau=0.15)
    assert set(found.frame.values.ravel()) == {frame}


def square(n: int, edges: list[tuple[int, int]]) -> np.ndarray:
    graph = np.zeros((n, n))
    for a, b in edges:
        graph[a, b] = graph[b, a] = 1.0
    return graph


@pytest.mark.parametrize(
    ("graph", "numbers"),
    [
        (square(4, [(0, 1), (1, 2), (2, 3), (3, 0)]), (1, 1, 1)),  # a ring has a hole
        (square(3, [(0, 1), (1, 2), (2, 0)]), (1, 1, 0)),  # a triangle is filled
        (square(5, [(0, 1), (2, 3)]), (3, 0, 0)),
        (square(4, [(a, b) for a in range(4) for b in range(a)]), (1, 3, 0)),
        # an octahedron is a sphere: all its cycles are filled
        (square(6, [(a, b) for a in range(6) for b in range(a) if a - b != 3]), (1, 7, 0)),
        # two rings in one point
        (square(7, [(0, 1), (1, 2), (2, 3), (3, 0), (0, 4), (4, 5), (5, 6), (6, 0)]), (1, 2, 2)),
    ],
)
def test_betti_numbers_of_known_graphs(graph: np.ndarray, numbers: tuple[int, int, int]) -> None:
    assert graphs.betti(graph, 0.5) == numbers


def test_gini_and_entropy_have_their_ends() -> None:
    assert graphs.gini(np.ones(7)) == pytest.approx(0)
    assert graphs.gini(np.array([0, 0, 0, 5.0])) == pytest.approx(0.75)
    assert graphs.entropy(np.ones(8)) == pytest.approx(np.log(8))
    assert np.isnan(graphs.entropy(np.zeros(3)))


def test_long_texts_are_refused_by_name_and_short_ones_undefined(pairs) -> None:
    model = pairs("llama").model
    found = reference_frames(model.record(torch.tensor([[5, 6]])))
    assert np.isnan(found.sinks.values.astype(float)).all()
    record = model.record(torch.randint(3, 61, (1, 40), generator=torch.Generator().manual_seed(0)))
    assert "holes" in reference_frames(record, topology=True)
    with pytest.raises(AnalysisError, match=r"tau=1\.5"):
        reference_frames(record, tau=1.5)


def test_a_long_record_takes_linear_memory_without_its_spectrum(uniform: hw.HookedModel) -> None:
    big = hw.load(hw_long())
    record = big.record(torch.randint(3, 61, (1, 700), generator=torch.Generator().manual_seed(0)))
    with pytest.raises(AnalysisError, match="spectrum is for up to 512"):
        reference_frames(record)
    assert reference_frames(record, spectrum=False).sinks.shape == (1, 1)


def hw_long():
    import transformers as hf

    torch.manual_seed(0)
    config = hf.GPT2Config(vocab_size=61, n_embd=8, n_layer=1, n_head=2, n_positions=1024)
    return hf.GPT2LMHeadModel(config).eval()
