"""Contrastive covariances against sums over single pairs in float64, and planted queries and keys.

Seen to fail: a token paired with itself, queries without both kinds counted, the key of another group, the two sides
exchanged, labels of the key not moved by one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import torch

import headwater as hw
from headwater import analyses
from headwater.analyses.heads import contrastive_qk as module
from headwater.analyses.heads.contrastive_qk import contrastive_qk, score_parts
from headwater.lens.errors import AnalysisError

IDS = torch.tensor([[3, 4, 3, 5, 4, 3, 4, 5, 3], [6, 3, 6, 4, 4, 6, 3, 1, 1]])
MASK = torch.tensor([[1] * 9, [1] * 7 + [0] * 2])


def by_pairs(
    record: hw.Record,
    layer: int,
    queries: torch.Tensor,
    keys: torch.Tensor,
    sides: list[np.ndarray] | None = None,
) -> tuple[np.ndarray, ...]:
    """Means over matches and others [2, head, d, d], and how many queries count; visible pairs are read off the map."""
    map = record.map(layer)
    q, k = sides or (map.q.double().numpy(), map.k.double().numpy())
    seen = map.dense().numpy() > 0
    batch, heads, length, width = map.shape
    found, count = np.zeros((2, heads, q.shape[-1], q.shape[-1])), np.zeros(heads, dtype=int)
    for row, head, i in np.ndindex(batch, heads, length):
        kinds: tuple[list, list] = [], []
        for j in range(width):
            if seen[row, head, i, j] and i != j and keys[row, j] >= 0:
                kinds[int(queries[row, i] != keys[row, j])].append(k[row, head * k.shape[1] // heads, j])
        if kinds[0] and kinds[1]:
            count[head] += 1
            for n, each in enumerate(kinds):
                found[n, head] += np.outer(q[row, head, i], np.mean(each, 0))
    return found / count.clip(1)[:, None, None], count


@pytest.mark.parametrize("name", ["gpt2", "mistral", "bert"])
def test_single_pairs(pairs: Callable, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    record = pairs(name).model.record(IDS, attention_mask=MASK)
    monkeypatch.setattr(module, "PAIRS", 30)  # a few rows at a time
    before = torch.where(MASK.roll(1, 1) * MASK > 0, IDS.roll(1, 1), -1)
    before[:, 0] = -1
    cases: tuple[tuple[module.Feature, torch.Tensor], ...] = (("token", IDS), ("previous", before))
    for feature, keys in cases:
        found = contrastive_qk(record, feature)
        for layer in record.layers:
            means, count = by_pairs(record, layer, IDS, keys)
            at = found.sel(layer=layer)
            assert count.min() > 0
            assert at.queries.values.tolist() == count.tolist()
            again = np.einsum("hcd,hc,hce->hde", at.query_directions, at.singular, at.key_directions)
            np.testing.assert_allclose(again, means[0] - means[1], atol=1e-9)
            scores = record.map(layer).rule.scale * np.einsum("nhdd->hn", means)
            np.testing.assert_allclose(at.score.sum("part"), scores, atol=1e-9)
            squares = at.singular.values**2
            size = (squares.cumsum(-1) < 0.99 * squares.sum(-1, keepdims=True)).sum(-1) + 1
            assert at["rank"].values.tolist() == size.tolist()


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_parts_of_each_score(pairs: Callable, name: str) -> None:
    record = pairs(name).model.record(IDS, attention_mask=MASK)
    found = contrastive_qk(record, rank=2)
    map = record.map(1)
    parts = [score_parts(record, found, "1.3", i, row) for row, i in ((0, 8), (1, 6))]
    for part, (row, i) in zip(parts, ((0, 8), (1, 6)), strict=True):
        logs = torch.from_numpy(part.sum("part").values)
        shown = map.dense()[row, 3, i]
        weights = logs.masked_fill(shown == 0, -torch.inf).softmax(-1)
        np.testing.assert_allclose(weights, shown, atol=1e-5)
    # the means over pairs are means of the single scores
    queries, values = 0, np.zeros((2, 4))
    for row, i in np.ndindex(IDS.shape):
        if MASK[row, i]:
            seen = (map.dense()[row, 3, i] > 0) & (torch.arange(9) != i)
            kinds = [(seen & same).numpy() for same in (IDS[row] == IDS[row, i], IDS[row] != IDS[row, i])]
            if all(kind.any() for kind in kinds):
                part, queries = score_parts(record, found, "1.3", i, row).values, queries + 1
                values += [part[:, kind].mean(1) for kind in kinds]
    np.testing.assert_allclose(found.score.sel(layer=1, head=3), values / queries, atol=1e-6)


def planted(
    uniform: hw.HookedModel, noise: float
) -> tuple[hw.Record, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A record in whose head 1.2 queries and keys share one sign, along u and v; all else is noise."""
    generator = torch.Generator().manual_seed(3)
    record = uniform.record(torch.randint(3, 60, (4, 60), generator=generator))
    map = record.map(1)
    sign = torch.randint(0, 2, (4, 60), generator=generator)
    q, k = (noise * torch.randn(map.q.shape, generator=generator) for _ in range(2))
    u, v = (torch.nn.functional.normalize(torch.randn(8, generator=generator), dim=0) for _ in range(2))
    q[:, 2] += 3 * (2 * sign - 1)[..., None] * u
    k[:, 2] += 3 * (2 * sign - 1)[..., None] * v + 5.0  # the same on every key tells nothing
    changed = dataclasses.replace(map, q=q, k=k)
    return dataclasses.replace(record, maps={**record.maps, 1: changed}), sign, u, v


def test_a_planted_direction_is_found(uniform: hw.HookedModel) -> None:
    record, sign, u, v = planted(uniform, noise=0.3)
    found = contrastive_qk(record, labels=sign, layers=1).sel(layer=1)
    assert found.above_chance.values.tolist()[2] == 1
    assert abs(found.query_directions[2, 0].values @ u.numpy()) > 0.99
    assert abs(found.key_directions[2, 0].values @ v.numpy()) > 0.99
    # difference of the keys' means is 6 v, and the query has 3 u sign; each sign is as frequent
    assert float(found.singular[2, 0]) == pytest.approx(18, rel=0.03)
    assert float(found.singular[2, 1] / found.singular[2, 0]) < 0.05
    others = found.isel(head=[0, 1, 3])
    assert float((others.singular[:, 0] / others.shuffled).max()) < 3  # noise alone is like chance
    clean, sign, *_ = planted(uniform, noise=0.0)
    exact = contrastive_qk(clean, labels=sign, layers=1).sel(layer=1, head=2)
    assert int(exact["rank"]) == 1
    gap = exact.score.sel(match=True) - exact.score.sel(match=False)
    assert float(gap.sel(part="subspace")) == pytest.approx(float(gap.sum()), rel=1e-6)


def test_what_can_not_be_compared(uniform: hw.HookedModel) -> None:
    record = uniform.record(torch.arange(3, 12)[None])
    with pytest.raises(AnalysisError, match="no query sees both"):
        contrastive_qk(record)
    with pytest.raises(AnalysisError, match=r"labels should be whole numbers of shape \(1, 9\)"):
        contrastive_qk(record, labels=torch.zeros(9, dtype=torch.long))
    with pytest.raises(AnalysisError, match="goes with labels="):
        contrastive_qk(record, key_labels=torch.zeros(1, 9, dtype=torch.long))
    found = contrastive_qk(record, labels=torch.arange(9)[None] % 2, layers=[0])
    with pytest.raises(AnalysisError, match="did not read layer 2"):
        analyses.score_parts(record, found, "2.0", -1)


@pytest.mark.parametrize("left", [True, False])
def test_unrotated_queries_and_keys_are_those_of_the_projections(pairs: Callable, left: bool) -> None:
    pair = pairs("llama")
    ids, mask = (x.flip(1) if left else x for x in (IDS, MASK))
    record = pair.model.record(ids, attention_mask=mask)
    found = contrastive_qk(record, unrotated_by=pair.model)
    labels, seen = ids.masked_fill(mask == 0, -1), []
    hooks = [
        module.register_forward_hook(lambda _, args, out: seen.append(out[0].detach()))
        for block in pair.twin.model.layers
        for module in (block.self_attn.q_proj, block.self_attn.k_proj)
    ]
    with torch.no_grad():
        for row, real in zip(ids, mask.bool(), strict=True):
            pair.twin(row[None, real])
    for hook in hooks:
        hook.remove()
    for layer in record.layers:
        sides = []
        for n in (2 * layer, 2 * layer + 1):
            side = np.zeros((*ids.shape, seen[n].shape[-1]))
            for row, real in enumerate(mask.bool().numpy()):
                side[row, real] = seen[n + row * 2 * len(record.layers)]
            sides.append(side.reshape(*ids.shape, -1, 8).swapaxes(1, 2))
        means, _ = by_pairs(record, layer, labels, labels, sides)
        at = found.sel(layer=layer)
        again = np.einsum("hcd,hc,hce->hde", at.query_directions, at.singular, at.key_directions)
        np.testing.assert_allclose(again, means[0] - means[1], atol=1e-5)
        one = score_parts(record, found, f"{layer}.3", query=4, batch=1, unrotated_by=pair.model).sum("part")
        real = mask[1].bool().numpy()
        np.testing.assert_allclose(
            one[real], (sides[0][1, 3, 4] @ sides[1][1, 1].T)[real] / 8**0.5, atol=1e-5
        )
    with pytest.raises(AnalysisError, match="without their rotation"):
        score_parts(record, found, "0.0", query=4)
