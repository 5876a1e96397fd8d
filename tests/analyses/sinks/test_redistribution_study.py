"""The study against the same redistributions written out on dense maps, its controls, its filter and its intervals.

Seen to fail: ACT's first sinks left in; a filter that keeps every head.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from dense_oracle import Oracle, run

import headwater as hw
from headwater.analyses._measures.bootstrap import interval
from headwater.analyses.sinks._control_keys import control_keys, half_of_others
from headwater.analyses.sinks._redistributed_runs import other_heads
from headwater.analyses.sinks.find_sinks import find_sinks
from headwater.analyses.sinks.redistribution_study import redistribution_study
from headwater.lens.errors import AnalysisError, HeadError, HeadwaterError

HEADS = ["0.1", "1.0", "1.3", "2.2"]


def texts(count: int = 3, length: int = 10) -> torch.Tensor:
    return torch.randint(3, 61, (count, length), generator=torch.Generator().manual_seed(4))


def in_set() -> torch.Tensor:
    mask = torch.zeros(3, 4, dtype=torch.bool)
    for name in HEADS:
        mask[int(name[0]), int(name[2])] = True
    return mask


def dense_value(twin, ids: torch.Tensor, flags: torch.Tensor, keep: np.ndarray) -> float:
    """Minus the loss of one text with weights on flags [layer, head, key] times keep [layer], given to the others."""

    def moved(layer: int, w: torch.Tensor) -> torch.Tensor:
        taken = flags[layer][None, :, None]
        others = (w * ~taken).sum(-1, keepdim=True)
        freed = (1 - keep[layer]) * (w * taken).sum(-1, keepdim=True)
        new = torch.where(taken, w * keep[layer], w * (1 + freed / others.clamp_min(1e-30)))
        return torch.where(others > 0, new, w)

    logits = run(twin, ids[None], None, Oracle(weights=moved)).double()
    return -float(torch.nn.functional.cross_entropy(logits[0, :-1], ids[1:]))


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_every_treatment_is_the_dense_edit(pairs: Callable, name: str) -> None:
    pair, ids, chosen = pairs(name), texts(), in_set()
    twin = copy.deepcopy(pair.twin)
    found = redistribution_study(
        pair.model, ids, keep=[0.0, 0.5], heads={"some": HEADS}, threshold=0.25, controls=1, draws=50, batch_size=5
    )  # fmt: skip
    record = pair.model.record(ids)
    sinks = torch.from_numpy(find_sinks(record, threshold=0.25).sink.values.copy())
    maps = pair.maps(ids).transpose(0, 1)
    half = half_of_others(sinks, torch.ones_like(sinks[:, 0, 0]), [0, 1, 2], 0, 0)
    other = other_heads(chosen, 0, 0)
    assert not (other & chosen).any()
    assert other.sum() == 4
    keys = {
        "sinks": sinks & chosen[..., None], "random_heads": sinks & other[..., None],
        "random_keys": control_keys(sinks, torch.ones_like(sinks[:, 0, 0]), [0, 1, 2], 0, 0) & chosen[..., None],
        "same_mass": half & chosen[..., None],
    }  # fmt: skip
    mass = {what: (maps * flags[..., None, :]).sum(-1).mean(-1).numpy() for what, flags in keys.items()}
    for b, keep, what in [(b, keep, what) for b in range(3) for keep in (0.0, 0.5) for what in keys]:
        kept = np.full(3, keep)
        if what == "same_mass":
            wanted, there = mass["sinks"][b].sum(-1), mass[what][b].sum(-1)
            kept = np.clip(1 - (1 - keep) * wanted / np.maximum(there, 1e-12), 0, 1)
        plain = dense_value(twin, ids[b], torch.zeros(3, 4, 10, dtype=torch.bool), np.ones(3))
        value = dense_value(twin, ids[b], keys[what][b], kept)
        at = {"heads": "some", "keep": keep, "treatment": what}
        np.testing.assert_allclose(found.plain[b], plain, rtol=1e-5)
        np.testing.assert_allclose(found.effect.sel(at)[b], value - plain, atol=2e-5)
        freed = ((1 - kept)[:, None] * mass[what][b]).sum() / 4
        np.testing.assert_allclose(found.freed.sel(at)[b], freed, atol=1e-5)
    assert float(abs(found.effect.sel(treatment="sinks")).max()) > 1e-3
    np.testing.assert_allclose(found.sinks, sinks.sum(-1).double().mean((1, 2)))


def test_intervals_are_paired_over_texts(pairs: Callable) -> None:
    found = redistribution_study(
        pairs("gpt2").model,
        texts(4),
        keep="0.2",
        heads="0.0 1.1",
        threshold=0.25,
        controls=2,
        draws=60,
        seed=3,
    )
    effect = found.effect.values[0, 0].T  # text, treatment
    for name, values in zip(("mean", "low", "high"), interval(effect, 60, 3), strict=True):
        np.testing.assert_allclose(found[name].values[0, 0], values)
    beyond = np.stack(interval(effect[:, :1] - effect[:, 1:], 60, 3), -1)
    np.testing.assert_allclose(found.beyond.values[0, 0], beyond)
    again = redistribution_study(
        pairs("gpt2").model, texts(4), keep="0.2", heads="0.0 1.1", threshold=0.25, controls=2, draws=60, seed=3,
        batch_size=1,
    )  # fmt: skip
    np.testing.assert_allclose(again.effect, found.effect, atol=1e-5)
    other = redistribution_study(
        pairs("gpt2").model,
        texts(4),
        keep="0.2",
        heads="0.0 1.1",
        threshold=0.25,
        controls=2,
        draws=60,
        seed=4,
    )
    assert not np.allclose(
        other.effect.sel(treatment="random_keys"), found.effect.sel(treatment="random_keys")
    )
    np.testing.assert_allclose(
        other.effect.sel(treatment="sinks"), found.effect.sel(treatment="sinks"), atol=1e-5
    )


def test_neutral_and_closed_forms(uniform: hw.HookedModel, pure_sink: hw.HookedModel) -> None:
    one = redistribution_study(pure_sink, texts(2), keep=[1.0, 0.5], controls=1, draws=10)
    assert (one.effect.sel(keep=1.0, treatment="sinks") == 0).all()
    np.testing.assert_allclose(one.freed.sel(keep=0.5, treatment="sinks"), 0.5, rtol=1e-5)
    np.testing.assert_allclose(one.freed.sel(keep=0.5, treatment="random_keys"), 0.0, atol=1e-5)
    assert np.isnan(one.effect.sel(treatment="random_heads")).all()  # the set holds all heads
    # uniform rows: a share of H_10/10 = 0.29 is no sink, so that nothing moves and no run is made
    none = redistribution_study(uniform, texts(2), keep="0", controls=1, draws=10)
    assert (none.effect.sel(treatment=["sinks", "random_keys"]) == 0).all()
    first = redistribution_study(uniform, texts(2), rule=None, keys=[0], keep="0", controls=1, draws=10)
    harmonic = sum(1 / i for i in range(1, 11)) / 10
    np.testing.assert_allclose(first.freed.sel(treatment="sinks"), harmonic, rtol=1e-5)


def test_the_filter_keeps_the_heads_that_act_keeps(pairs: Callable) -> None:
    model, ids = pairs("llama").model, texts(2, 14)
    alpha = 2.0
    found = redistribution_study(
        model, ids, rule="act", threshold=alpha / 14, keep="0.4", held_out=ids, controls=1, draws=10
    )
    names = json.loads(found.attrs["filtered"])
    by_recipe = hw.recipes.calibration_heads(model, ids, alpha=alpha, layers=model.layers)
    assert names == [str(head) for head in by_recipe]
    assert 0 < len(names) < 12
    assert list(found.coords["heads"].values) == ["all", "filtered"]


def test_measures_by_answer_and_by_function(pairs: Callable) -> None:
    model, ids = pairs("gpt2").model, texts(2)
    settings: dict[str, Any] = {"keep": "0", "threshold": 0.25, "controls": 1, "draws": 10}
    named = redistribution_study(model, ids, answer="#7", kind="logit", **settings)
    own = redistribution_study(model, ids, lambda logits: logits[:, -1, 7], **settings)
    np.testing.assert_allclose(named.effect, own.effect, atol=1e-6)
    np.testing.assert_allclose(named.plain, model(ids)[:, -1, 7], rtol=1e-5)


def test_refusals(pairs: Callable) -> None:
    model, ids = pairs("gpt2").model, texts(2)
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        ({"keep": "0 2"}, "keep='0 2' is outside its limits"),
        ({"keep": "half"}, "not a list of numbers"),
        ({"controls": 0}, "controls=0"),
        ({"heads": ";"}, "names no set"),
        ({"held_out": ids, "answer": [3, 4]}, "no answers of their own"),
    )
    for settings, message in cases:
        with pytest.raises(AnalysisError, match=message):
            redistribution_study(model, ids, **settings)
    with pytest.raises(HeadError, match=r"no such head: 9\.9"):
        redistribution_study(model, ids, heads="9.9")
    with pytest.raises(HeadwaterError, match="loss"):
        redistribution_study(pairs("bert").model, ids)
