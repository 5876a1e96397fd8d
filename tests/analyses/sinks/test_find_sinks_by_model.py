"""Massive activations against the formula on the model's own hidden states, the spectral rule against dense SVDs.

Seen to fail: the stream leaving a layer in the place of the one entering it; the mean in the place of the mean square;
a single step of the power iteration.
"""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import pytest
import torch
from ragged import padded

import headwater as hw
from headwater.analyses.sinks.find_sinks import find_sinks
from headwater.lens.errors import AnalysisError, HeadError, RecordError

KEEP = ("qk", "residual")


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert"])
def test_massive_is_the_formula_on_hidden_states(pairs: Callable, name: str) -> None:
    pair = pairs(name)
    ids, mask = padded(side="left" if name == "llama" else "right")
    found = find_sinks(
        pair.model.record(ids, attention_mask=mask, keep=KEEP),
        rule="massive", dimensions=[3, 7], threshold=1.2,
    )  # fmt: skip
    assert found.score.dims == ("batch", "layer", "key")
    some = 0
    for b, kept in enumerate(mask.bool()):
        with torch.no_grad():
            states = pair.twin(ids[b][kept][None], output_hidden_states=True).hidden_states
        for layer in range(3):
            x = states[layer][0]
            phi = x[:, [3, 7]].abs().amax(-1) / (x.square().mean(-1) + 1e-6).sqrt()
            np.testing.assert_allclose(found.score.values[b, layer][kept], phi, rtol=2e-3)
            some += int((phi > 1.2).sum())
        assert np.isnan(found.score.values[b, 0][~kept]).all()
    assert int(found.sink.sum()) == some == found.sizes["found"] > 5
    one = tuple(int(found[f"found_{axis}"][0]) for axis in ("batch", "layer", "position"))
    assert found.found_score[0] == found.score.values[one]
    np.testing.assert_allclose(found.heads[one[0], one[2]], found.sink[one[0], :, one[2]].mean())


def test_massive_dimensions_are_found_on_the_first_token(pure_sink: hw.HookedModel) -> None:
    # position 0 holds 30 in dimension 0 of a stream of 32, of which the others are about 0.2
    ids = torch.randint(3, 61, (2, 12), generator=torch.Generator().manual_seed(0))
    record = pure_sink.record(ids, keep=KEEP)
    found = find_sinks(record, rule="massive", threshold=5.5)
    assert json.loads(found.attrs["dimensions_"]) == [0]
    np.testing.assert_array_equal(found.sink.any("layer"), [[True] + [False] * 11] * 2)
    np.testing.assert_allclose(found.score[0, 0, 0], 32**0.5, rtol=5e-3)  # one dimension that carries all
    assert hw.recipes.massive_dimensions(pure_sink, ids, tau=5.5) == [0]
    none = find_sinks(record, rule="massive")  # √32 is below 20 root mean squares
    assert json.loads(none.attrs["dimensions_"]) == []
    assert not none.sink.any()
    assert (none.score == 0).all()


@pytest.mark.parametrize("name", ["gpt2", "bert", "gpt_oss"])
def test_spectral_is_the_leading_singular_vector(pairs: Callable, name: str) -> None:
    pair = pairs(name)
    ids, mask = padded()
    maps = pair.maps(ids, mask)
    found = find_sinks(pair.model.record(ids, attention_mask=mask), rule="spectral", threshold=0.3)
    told_apart = 0
    for layer, b, h in np.ndindex(*maps.shape[:3]):
        real = mask[b].bool()
        dense = maps[layer, b, h][real][:, real]
        _, size, vectors = torch.linalg.svd(dense)
        assert np.isnan(found.score.values[b, layer, h][~real]).all()
        if len(size) > 1 and size[1] < 0.8 * size[0]:
            told_apart += 1
            np.testing.assert_allclose(found.score.values[b, layer, h][real], vectors[0] ** 2, atol=2e-3)
    assert told_apart > 10
    np.testing.assert_allclose(found.score.sum("key"), 1, rtol=1e-4)


def test_spectral_closed_forms(pure_sink: hw.HookedModel, uniform: hw.HookedModel) -> None:
    ids = torch.randint(3, 61, (1, 16), generator=torch.Generator().manual_seed(0))
    found = find_sinks(pure_sink.record(ids), rule="spectral")
    np.testing.assert_allclose(found.score, np.broadcast_to([1.0] + [0.0] * 15, (1, 3, 4, 16)), atol=1e-5)
    np.testing.assert_array_equal(found.heads[0], [1.0] + [0.0] * 15)
    assert found.attrs["unsettled"] == 0
    long = torch.randint(3, 61, (1, 64), generator=torch.Generator().manual_seed(0))
    even = find_sinks(uniform.record(long), rule="spectral")
    np.testing.assert_allclose(even.score[0, 0, 0, 0], 0.46, atol=0.002)
    assert not even.sink.any()


def test_one_token_and_one_head(one_head: hw.HookedModel) -> None:
    record = one_head.record(torch.tensor([[5]]), keep=KEEP)
    np.testing.assert_allclose(find_sinks(record, rule="spectral").score, 1.0)
    assert find_sinks(record, rule="massive", dimensions=0).score.shape == (1, 2, 1)


def test_what_they_need_is_named(pairs: Callable) -> None:
    ids = torch.arange(3, 12)[None]
    plain = pairs("gpt2").model.record(ids)
    with pytest.raises(RecordError, match=r"no residual stream; record with keep=\('qk', 'residual'\)"):
        find_sinks(plain, rule="massive")
    with pytest.raises(
        AnalysisError, match="dimensions holds 99; the residual stream has dimensions 0 to 31"
    ):
        find_sinks(pairs("gpt2").model.record(ids, keep=KEEP), rule="massive", dimensions=[1, 99])
    with pytest.raises(AnalysisError, match="belong to rule='massive'"):
        find_sinks(plain, dimensions=3)
    with pytest.raises(AnalysisError, match="rule='spectral' has none"):
        find_sinks(plain, rule="spectral", unit_rows=True)
    with pytest.raises((RecordError, HeadError)):
        find_sinks(pairs("gpt2").model.record(ids, keep=()), rule="spectral")
