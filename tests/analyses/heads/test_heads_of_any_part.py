"""Head analyses on pictures, sound and two-sided texts, on each part of a model, against gates by hand.

Mutations seen to fail: every run begun at the last layer, the slopes of one example given to the next.
"""

from __future__ import annotations

import any_input
import numpy as np
import pytest
import torch

from headwater import analyses
from headwater.lens.errors import AnalysisError


@pytest.fixture(scope="module", params=any_input.PARTS, ids="-".join)
def case(request: pytest.FixtureRequest) -> any_input.Case:
    return any_input.case(*request.param)


def test_importance_by_gradient(case: any_input.Case) -> None:
    slopes = []
    for one in case.each:
        gates = torch.ones(case.model.n_layers, case.model.n_heads, dtype=torch.float64, requires_grad=True)
        with case.gated(gates):
            slopes.append(torch.autograd.grad(case.score(case.plain(**one)).sum(), gates)[0])
    expected = torch.stack(slopes).abs()
    assert expected.max() > 1e-6
    found = analyses.head_importance(case.model, case.tokens, loss=case.loss, per_example=True)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-9)


def test_importance_by_ablation(case: any_input.Case) -> None:
    layers, heads = case.model.n_layers, case.model.n_heads
    expected = np.zeros((2, layers, heads))
    with torch.no_grad():
        for row, one in enumerate(case.each):
            base = case.score(case.plain(**one))
            for layer, head in np.ndindex(layers, heads):
                gates = torch.ones(layers, heads, dtype=torch.float64)
                gates[layer, head] = 0
                with case.gated(gates):
                    expected[row, layer, head] = float(case.score(case.plain(**one)) - base)
    found = analyses.head_importance(
        case.model, case.tokens, how="ablation", loss=case.loss, per_example=True, batch_size=2
    )
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-9)


def test_offsets_are_trained_on_every_part(case: any_input.Case) -> None:
    """The losses before and after are those of the plain model without and with the vectors added."""
    found = analyses.fit_offsets(case.model, case.tokens, "1.0 1.2", loss=case.loss, steps=4, rate=0.1)
    offsets = torch.from_numpy(found.offset.values).double()
    with torch.no_grad():
        before = np.mean([float(case.score(case.plain(**one))) for one in case.each])
        with case.changed(lambda place, z: z + offsets[place]):
            after = np.mean([float(case.score(case.plain(**one))) for one in case.each])
    np.testing.assert_allclose([found.loss_before, found.loss_after], [before, after], rtol=1e-5)
    assert after < before
    with case.model.edit(analyses.offsets_edit(found)):
        edited = analyses.localize_heads(case.model, case.tokens, loss=case.loss, steps=1).loss_before
    np.testing.assert_allclose(edited, after, rtol=1e-5)


def test_gates_are_learned_on_every_part(case: any_input.Case) -> None:
    found = analyses.learn_gates(case.model, case.tokens, loss=case.loss, steps=2)
    gates = torch.from_numpy(found.gate.values).double()
    with torch.no_grad(), case.gated(gates):
        expected = np.mean([float(case.score(case.plain(**one))) for one in case.each])
    np.testing.assert_allclose(found.loss_gated, expected, rtol=1e-5)


def test_heads_go_from_every_part(case: any_input.Case) -> None:
    found = analyses.prune_heads(case.model, case.tokens, loss=case.loss, step=0.5, controls=0, draws=5)
    ranks = analyses.head_importance(case.model, case.tokens, loss=case.loss, normalise="layer")
    units = ranks.values.reshape(-1, case.model.n_heads // case.model.n_kv_heads).sum(1)
    expected = np.zeros_like(ranks.values).reshape(len(units), -1)
    expected[np.argsort(units, kind="stable")[: len(units) // 2]] = 1
    np.testing.assert_array_equal(found.removed[1].values.reshape(len(units), -1), expected)
    for place in range(3):
        gates = torch.from_numpy(1.0 - found.removed.values[place])
        with torch.no_grad(), case.gated(gates):
            losses = [float(case.score(case.plain(**one))) for one in case.each]
        np.testing.assert_allclose(found.per_example[:, place], losses, rtol=1e-5)


def test_all_kinds_of_attention_go_together() -> None:
    """Ranks are those of each part side by side; what goes is gated in the plain model in all parts at once."""
    cases = [any_input.case("t5", part) for part in ("encoder", "cross")]
    given = cases[0]
    settings = {"loss": given.loss, "step": 0.25, "controls": 0, "draws": 5}
    found = analyses.prune_heads(given.model, given.tokens, parts="encoder, cross", **settings)
    ranks = [
        analyses.head_importance(c.model, given.tokens, loss=given.loss, normalise="layer") for c in cases
    ]
    np.testing.assert_allclose(found.importance, np.stack([one.values for one in ranks]))
    names = [f"{part} {n // 4}.{n % 4}" for part in ("encoder", "cross") for n in range(8)]
    flat = np.concatenate([one.values.ravel() for one in ranks])
    assert found.order.values.tolist() == [names[n] for n in np.argsort(flat, kind="stable")]
    assert found.removed.dims == ("fraction", "part", "layer", "head")
    both = [c._replace(plain=given.plain) for c in cases]
    for place in range(5):
        gates = [torch.from_numpy(1.0 - found.removed.values[place, n]) for n in range(2)]
        with torch.no_grad(), both[0].gated(gates[0]), both[1].gated(gates[1]):
            losses = [float(given.score(given.plain(**one))) for one in given.each]
        np.testing.assert_allclose(found.per_example[:, place], losses, rtol=1e-5)
    with pytest.raises(AnalysisError, match="parts='encodr' are no parts of"):
        analyses.prune_heads(given.model, given.tokens, parts="encodr", **settings)


def test_a_group_is_hidden_from_the_part(case: any_input.Case) -> None:
    """Patches, sound, words of the encoder: heads of the first layer see all other keys as without the group."""
    found = analyses.head_contrast(case.model, case.tokens, group=[1], how="hide")
    part = case.model.parts[case.model.part_name]
    for row in range(2):
        batch = case.tokens.rows([row])
        record = case.model.record(batch, keep=("qkv",), layers=case.model.layers[0])
        queries, keys = record.valid[0], (record if record.keys is None else record.keys).valid[0]
        weights = record.pattern(layer=case.model.layers[0])[0][:, queries][:, :, keys].double()
        values = record.values[case.model.layers[0]][0][:, keys].double()
        values = values.repeat_interleave(len(weights) // len(values), 0)
        last = weights[:, -1]
        if not part.crosses and part.causal and len(last) == 2:
            continue
        left = last.clone()
        left[:, 1] = 0
        left = left / left.sum(-1, keepdim=True)
        moved = ((last - left)[:, None] @ values)[:, 0].norm(dim=-1)
        np.testing.assert_allclose(found.divergence[row, 0], moved, rtol=1e-3, atol=1e-6)
    if part.keys not in ("text", "decoder"):
        with pytest.raises(AnalysisError, match="is for words, and these tokens are of"):
            analyses.head_contrast(case.model, case.tokens, group=[1], how="remove")
