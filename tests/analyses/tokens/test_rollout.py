"""Rollout against dense products of eager float64 maps, its closed forms, and its refusals."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

import headwater as hw
from headwater.analyses.tokens.rollout import rollout
from headwater.lens.errors import AnalysisError, HeadwaterError


def dense_rollout(layers: Tensor, weight: float) -> Tensor:
    """Product of rownorm((1 - w)·A + w·I) over [layer, batch, query, key], later layers on the left."""
    eye = torch.eye(layers.shape[-1], dtype=torch.float64)
    product = eye.expand(layers.shape[1:])
    for layer in layers:
        mixed = (1 - weight) * layer + weight * eye
        product = mixed / mixed.sum(-1, keepdim=True) @ product
    return product


def rows_of(result: Tensor, mask: Tensor, query: int) -> np.ndarray:
    """One row per batch entry, the query counted in real tokens."""
    picked = [row[real.bool().nonzero()[query, 0]] for row, real in zip(result, mask, strict=True)]
    return torch.stack(picked).numpy()


@pytest.mark.parametrize("heads", ["mean", "max", "min"])
def test_matches_dense_product(pair, batch, heads: str) -> None:
    ids, mask = batch
    record = pair.model.record(ids, attention_mask=mask)
    maps = pair.maps(ids, mask)
    merged = {"mean": maps.mean(2), "max": maps.amax(2), "min": maps.amin(2)}[heads]
    expected = dense_rollout(merged, 0.3)
    found = rollout(record, queries=[0, -1, 2], residual=0.3, heads=heads)
    assert found.dims == ("batch", "query", "key")
    for place, query in enumerate((0, -1, 2)):
        np.testing.assert_allclose(found.values[:, place], rows_of(expected, mask, query), atol=2e-6)
    np.testing.assert_allclose(found.sum("key"), 1, atol=1e-5)


def test_weights_per_head_without_residual(causal_pair, batch) -> None:
    ids, mask = batch
    maps = causal_pair.maps(ids, mask)
    weights = np.random.default_rng(3).random((3, 4))
    shares = torch.from_numpy(weights / weights.sum(1, keepdims=True))
    merged = torch.einsum("lbhqk,lh->lbqk", maps, shares)
    # padding rows are empty; standing still keeps them out of the way
    empty = ~mask.bool()
    merged = merged + torch.diag_embed(empty.double())[None]
    expected = dense_rollout(merged, 0.0)
    record = causal_pair.model.record(ids, attention_mask=mask)
    found = rollout(record, heads=weights, add_residual=False)
    np.testing.assert_allclose(found.values[:, 0], rows_of(expected, mask, -1), atol=2e-6)


def test_every_query_and_last_layer(pair, batch) -> None:
    ids, mask = batch
    record = pair.model.record(ids, attention_mask=mask)
    expected = dense_rollout(pair.maps(ids, mask).mean(2)[:2], 0.5)
    found = rollout(record, queries="all", last_layer=1)
    real = mask.bool().numpy()
    np.testing.assert_allclose(found.values[real], expected.numpy()[real], atol=2e-6)
    assert np.isnan(found.values[~real]).all()


def test_a_record_of_later_layers_starts_at_its_first(pairs: Callable) -> None:
    pair = pairs("llama")
    ids = torch.randint(3, 61, (2, 7), generator=torch.Generator().manual_seed(1))
    expected = dense_rollout(pair.maps(ids).mean(2)[1:], 0.5)
    found = rollout(pair.model.record(ids, layers=range(1, 3)))
    np.testing.assert_allclose(found.values[:, 0], expected[:, -1].numpy(), atol=2e-6)
    with pytest.raises(AnalysisError, match="layer 1 is missing"):
        rollout(pair.model.record(ids, layers=[0, 2]))


def test_more_queries_than_travel_together(pairs: Callable) -> None:
    pair = pairs("gpt2")
    ids = torch.randint(3, 61, (1, 64), generator=torch.Generator().manual_seed(2))
    record = pair.model.record(ids)
    asked = [*list(range(64)), -1]
    found = rollout(record, queries=asked)
    expected = dense_rollout(pair.maps(ids).mean(2), 0.5)
    np.testing.assert_allclose(found.values[0, :64], expected[0].numpy(), atol=2e-6)
    np.testing.assert_array_equal(found.values[0, 64], found.values[0, 63])


def test_uniform_attention_has_a_closed_form(uniform: hw.HookedModel) -> None:
    """Causal rows of 1/(i+1): one layer gives 1/2·(1/n) and 1/2 more on self."""
    ids = torch.randint(3, 61, (1, 10), generator=torch.Generator().manual_seed(0))
    found = rollout(uniform.record(ids), last_layer=0).values[0, 0]
    np.testing.assert_allclose(found, [0.05] * 9 + [0.55], atol=1e-6)


def test_pure_sink_keeps_half_of_itself_per_layer(pure_sink: hw.HookedModel) -> None:
    ids = torch.randint(3, 61, (1, 6), generator=torch.Generator().manual_seed(0))
    record = pure_sink.record(ids)
    for layer in range(3):
        found = rollout(record, last_layer=layer).values[0, 0]
        kept = 0.5 ** (layer + 1)
        np.testing.assert_allclose(found, [1 - kept, 0, 0, 0, 0, kept], atol=1e-5)


def test_one_token_and_one_head(pairs: Callable, one_head: hw.HookedModel) -> None:
    alone = rollout(pairs("gpt2").model.record(torch.tensor([[7]])))
    np.testing.assert_allclose(alone.values, [[[1.0]]], atol=1e-6)  # exp(s - L) in float32
    ids = torch.arange(3, 9)[None]
    record = one_head.record(ids)
    for heads in ("mean", "max", "min"):
        np.testing.assert_allclose(rollout(record, heads=heads), rollout(record), atol=1e-6)


def test_blocked_row_stays_where_it_is(pairs: Callable) -> None:
    model = pairs("llama").model
    ids = torch.arange(3, 9)[None]
    with model.edit(hw.Knockout(queries=[-1], keys="all")):
        record = model.record(ids)
    np.testing.assert_allclose(rollout(record).values[0, 0], [0, 0, 0, 0, 0, 1], atol=1e-6)
    assert np.isnan(rollout(record, add_residual=False).values).all()
    assert not np.isnan(rollout(record, queries=[-2], add_residual=False).values).any()


def test_rollout_of_an_edited_run_is_of_the_edited_maps(pairs: Callable) -> None:
    pair = pairs("llama")
    ids = torch.arange(3, 12)[None]
    with pair.model.edit(hw.TowardIdentity(1.0)):
        found = rollout(pair.model.record(ids))
    np.testing.assert_allclose(found.values[0, 0], np.eye(9)[-1], atol=1e-6)
    assert "TowardIdentity" in str(found.attrs["edits"])


@pytest.mark.parametrize("heads", ["mean", "max", "min"])
def test_following_keys_upward_gives_the_same_shares(pair, batch, heads: str) -> None:
    """Two routes, P^T from the queries down and P from the keys up. Mutations seen to fail: the row sums of the layer
    below, the residual left out, the key's own column in place of its position."""
    ids, mask = batch
    record = pair.model.record(ids, attention_mask=mask)
    down = rollout(record, queries="all", residual=0.3, heads=heads)
    up = rollout(record, queries="all", residual=0.3, heads=heads, keys=[0, -1, 2])
    assert up.shape == (*down.shape[:2], 3)
    assert list(up.key.values) == [0, -1, 2]
    for row, real in enumerate(mask.bool()):
        columns = real.nonzero()[:, 0][[0, -1, 2]].numpy()
        np.testing.assert_allclose(up.values[row], down.values[row][:, columns], atol=2e-6)
        assert list(up.key_token.values[row]) == list(down.key_token.values[row][columns])


def test_what_is_undefined_downward_is_undefined_upward(pairs: Callable) -> None:
    """Without a residual a blocked row has no result, and only rows that look at it lose theirs."""
    model = pairs("llama").model
    ids = torch.arange(3, 12)[None]
    with model.edit(hw.Knockout(queries=[4], keys="all"), hw.Knockout(queries=[6], keys=[4])):
        record = model.record(ids)
    down = rollout(record, queries="all", add_residual=False)
    up = rollout(record, queries="all", add_residual=False, keys="all")
    np.testing.assert_allclose(up.values, down.values, atol=2e-6)
    assert 0 < np.isnan(down.values[0, :, 0]).sum() < 9


def test_result_says_what_it_is(pairs: Callable) -> None:
    found = rollout(pairs("llama").model.record(torch.arange(3, 9)[None]))
    for name in ("question", "unit", "paper", "not_for", "model", "revision", "edits", "residual"):
        assert name in found.attrs
    assert list(found.key.values) == list(range(6))
    assert found.key_token.dims == ("batch", "key")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"queries": [9]}, "batch row 0 has 6 tokens; give positions from -6 to 5"),
        ({"queries": []}, "queries is empty"),
        ({"queries": [0.5]}, "whole number"),
        ({"queries": "last"}, "not a list of whole numbers"),
        ({"residual": 1.5}, "from 0 to 1"),
        ({"heads": "median"}, "mean, max, min"),
        ({"heads": [[1.0, 0, 0, 0]]}, r"\(3, 4\)"),
        ({"heads": [[0.0] * 4] * 3}, "above 0"),
        ({"last_layer": 7}, "has layers"),
    ],
)
def test_refusals_name_value_and_mend(pairs: Callable, settings: dict, message: str) -> None:
    record = pairs("llama").model.record(torch.arange(3, 9)[None])
    with pytest.raises(AnalysisError, match=message):
        rollout(record, **settings)


def test_a_record_without_maps_is_refused(pairs: Callable) -> None:
    record = pairs("llama").model.record(torch.arange(3, 9)[None], keep=())
    with pytest.raises(HeadwaterError, match="keep"):
        rollout(record)


def test_trained_encoder(minilm) -> None:
    tokens = minilm.model.to_tokens(["The cat sat on the mat .", "Attention drains into one token of many ."])
    record = minilm.model.record(tokens)
    expected = dense_rollout(minilm.maps(tokens.ids, tokens.mask).mean(2), 0.5)
    found = rollout(record, queries=[0])
    np.testing.assert_allclose(found.values[:, 0], rows_of(expected, tokens.mask, 0), atol=5e-6)


def test_signed_weights_are_refused_by_name(pairs: Callable) -> None:
    model = pairs("llama").model
    ids = torch.arange(3, 9)[None]
    with model.edit(hw.Normaliser("cog")):
        record = model.record(ids, statistics=("received",))
        with pytest.raises(HeadwaterError, match="'entropy' is not defined; leave it out"):
            model.record(ids)
    with pytest.raises(AnalysisError, match="layer 0 may be negative"):
        rollout(record)
    with model.edit(hw.Normaliser("sigmoid")):
        rows = rollout(model.record(ids), queries="all")
    np.testing.assert_allclose(rows.sum("key"), 1, atol=1e-5)  # rows that sum to anything are divided by it
