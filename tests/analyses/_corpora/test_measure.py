"""Statistics of a corpus equal those written out from dense float64 maps of an eager twin."""

from __future__ import annotations

import json

import corpus_oracle as dense
import numpy as np
import pytest
import torch

import headwater as hw
from headwater.analyses._corpora import measure
from headwater.analyses._corpora.statistics import NAMES


@pytest.fixture
def texts(file) -> list[str]:
    return [json.loads(line)["text"] for line in file.read_text().splitlines()]


def read(pair, text: str) -> tuple[list[int], np.ndarray]:
    ids = pair.model.tokenizer(text).input_ids
    return ids, pair.maps(torch.tensor([ids]))[:, 0].numpy()


@pytest.fixture
def every(pair, texts) -> list[tuple[int, list[int], np.ndarray]]:
    """(row, ids, maps [layer, head, query, key]) of the texts that are measured."""
    return [(row, *read(pair, text)) for row, text in enumerate(texts) if len(text.split()) > 1]


def expected(every, layer: int, head: int) -> dict[str, list[tuple[float, int, int, int]]]:
    found = {name: [] for name in NAMES}
    for row, ids, maps in every:
        for name, rows in dense.rows(maps[layer, head], ids, dense.seen(maps[layer])).items():
            found[name] += [(value, query, key, row) for value, query, key in rows]
    return found


@pytest.mark.parametrize("elements", [2**22, 40], ids=["whole", "blocks"])
def test_sums_counts_bins_and_examples(pair, every, file, elements, monkeypatch) -> None:
    monkeypatch.setattr(measure, "ELEMENTS", elements)
    found = hw.corpus(pair.model, file, keep=2)
    assert found.state.told == {
        "texts": 5, "empty": 2, "short": 1, "cut": 0, "tokens": sum(len(ids) for _, ids, _ in every),
        "repeats": sum(len(ids) - len(set(ids)) for _, ids, _ in every),
    }  # fmt: skip
    for layer, head in ((0, 0), (1, 3), (2, 2)):
        for name, rows in expected(every, layer, head).items():
            values = np.array([value for value, *_ in rows])
            assert int(found.state.counts[NAMES.index(name), layer, head]) == len(rows), name
            if not len(rows):
                assert np.isnan(found.mean(name)[layer, head])
                assert not found.examples(layer, head, name)
                continue
            np.testing.assert_allclose(found.mean(name)[layer, head], values.mean(), atol=1e-5, err_msg=name)
            counts = found.histogram(name)[layer, head]
            ends = np.append(counts.low.values, np.inf)
            # a value that is within rounding of an edge may lie on either side of it
            near = [np.histogram(values + d, ends)[0] for d in (-1e-5, 0, 1e-5)]
            assert (counts >= np.min(near, 0) - (near[0] != near[2])).all(), name
            assert counts.sum() == len(rows), name
            best = {row: max(v for v, *_, r in rows if r == row) for row in {r for *_, r in rows}}
            tops = sorted(best.values(), reverse=True)[:2]
            examples = found.examples(layer, head, name)
            np.testing.assert_allclose([one.value for one in examples], tops, atol=1e-5, err_msg=name)
            for one in examples:
                assert any(
                    abs(v - one.value) < 1e-5 and (q, r) == (one.query, one.text) and k in (one.key, -1)
                    for v, q, k, r in rows
                ), (name, one)


def test_deciles_lie_in_the_bins_of_the_exact_ones(pair, every, file) -> None:
    found = hw.corpus(pair.model, file)
    for name in ("entropy", "weight", "free_previous"):
        values = np.sort([value for value, *_ in expected(every, 1, 2)[name]])
        got = found.deciles(name)[1, 2]
        if not len(values):
            assert np.isnan(got).all()
            continue
        exact = values[np.maximum(np.ceil(got.decile.values * len(values) - 1e-9).astype(int) - 1, 0)]
        assert (np.abs(got - exact) <= got.error + 1e-6).all(), name


def test_distances_and_tokens(pair, every, file) -> None:
    found = hw.corpus(pair.model, file)
    layer, head = 2, 1
    mass, to, by = np.zeros(5), {}, {}
    for _, ids, maps in every:
        for q, query in enumerate(ids):
            for k, key in enumerate(ids):
                x = maps[layer, head, q, k]
                mass[0 if q == k else int(np.log2(abs(q - k))) + 1] += x
                if k > 0:
                    to[key] = to.get(key, 0) + x
                    by[query] = by.get(query, 0) + x
    shares = found.distances()[layer, head]
    np.testing.assert_allclose(shares, (mass / mass.sum())[: shares.size], atol=1e-6)
    for side, wanted in (("to", to), ("from", by)):
        got = found.tokens(layer, head, side, n=99)
        assert [weight for _, weight in got] == sorted((weight for _, weight in got), reverse=True)
        for word, weight in got:
            token = pair.model.tokenizer.convert_tokens_to_ids(word)
            assert abs(wanted[token] - weight) < 1e-5 * max(wanted[token], 1), (side, word)
        assert len(got) == sum(weight > 2**-33 for weight in wanted.values())


def test_the_six_numbers_of_headvis(pair, every, file) -> None:
    found = hw.corpus(pair.model, file).headvis()
    for layer in range(3):
        wanted = dense.headvis([(ids, maps[layer]) for _, ids, maps in every])
        np.testing.assert_allclose(found.loc[layer].values.T, wanted, atol=1e-5)


def test_a_long_text_is_cut_at_its_end(pairs, file, texts) -> None:
    model = pairs("llama").model
    found = hw.corpus(model, file, length=4, keep=1)
    assert found.state.told["cut"] == 4
    assert found.state.told["tokens"] == 4 * 4 + 2
    assert (
        found.examples(0, 0, "self")[0].tokens
        == model.record(model.to_tokens(texts[found.examples(0, 0, "self")[0].text]).ids[:, :4]).strings[0]
    )
