"""Patching against one dense run per cell (transformers' eager attention in float64, torch hooks), and TransformerLens.

Mutations seen to fail: clean and corrupt exchanged in the effect, position taken for head, positions before the first
difference left out in a model that reads both ways, a group's key patched for one query head's view, a run resumed one
layer too late.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable

import dense_patching
import numpy as np
import pytest
import torch
from bridged import MISSING, both, quietly
from patch_pairs import ANSWER, CLEAN, CORRUPT, WRONG, difference

import headwater as hw
from headwater import analyses
from headwater.lens.errors import AnalysisError, ModelError

KINDS = {
    "head": "z", "head_position": "z", "residual": "resid", "attention": "attn", "mlp": "mlp", "pattern": "pattern",
    "destination_source": "pattern", "q": "q", "k": "k", "v": "v",
}  # fmt: skip
ALL = slice(None)


def place_of(what: str, cell: tuple[int, ...]) -> tuple:
    """Where a cell is in the sites of dense_patching."""
    if what in ("head", "q", "k", "v"):
        return ALL, ALL, cell[0]
    return (ALL, cell[1], cell[0]) if what == "head_position" else (ALL, *cell)


def densely(
    twin, what: str, shape: tuple[int, ...], how: str = "denoise", ablation: str = "resample"
) -> np.ndarray:
    """Effects [pair, layer, …], one run per cell."""
    base, other = (CORRUPT, CLEAN) if how == "denoise" else (CLEAN, CORRUPT)
    begin, end = (difference(twin(ids).logits.detach()) for ids in (base, other))
    source = dense_patching.seen(twin, other)
    out = np.zeros((2, *shape))
    for layer, *cell in itertools.product(*map(range, shape)):
        value = source[KINDS[what], layer]
        if ablation == "zero":
            value = torch.zeros_like(value)
        if ablation == "mean":
            value = value.mean(0, keepdim=True).expand_as(value)
        found = dense_patching.with_one(twin, base, KINDS[what], layer, place_of(what, tuple(cell)), value)
        out[(ALL, layer, *cell)] = (difference(found) - begin) / (end - begin)
    return out


def check(found, expected: np.ndarray) -> None:
    values = found.values
    hidden = np.isnan(values)
    if found.attrs["what"] == "destination_source":
        causal = np.triu(np.ones((6, 6), dtype=bool), 1)
        assert (hidden == causal).all()
    else:
        assert not hidden.any()
    np.testing.assert_allclose(values[~hidden], expected[~hidden], atol=2e-4, rtol=2e-4)
    assert values[~hidden].std() > 1e-3


@pytest.mark.parametrize("what", KINDS)
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_every_cell_is_a_dense_run(pairs: Callable, name: str, what: str) -> None:
    pair = pairs(name)
    found = analyses.patch(
        pair.model,
        CLEAN,
        CORRUPT,
        what=what,
        answer=ANSWER,
        wrong=WRONG,
        per="kv_head" if what in "kv" else None,
    )
    check(found, densely(pair.twin, what, found.shape[1:]))
    shared = name == "llama" and what in "kv"
    assert found.sizes.get("kv_head") == (2 if shared else None)


@pytest.mark.parametrize("name", ["mistral", "gemma2", "gpt_oss"])
@pytest.mark.parametrize("what", ["head", "mlp"])
def test_other_architectures(pairs: Callable, name: str, what: str) -> None:
    pair = pairs(name)
    found = analyses.patch(pair.model, CLEAN, CORRUPT, difference, what=what, how="noise")
    check(found, densely(pair.twin, what, found.shape[1:], "noise"))


@pytest.mark.parametrize("what", ["head", "head_position", "residual", "pattern"])
def test_a_model_that_reads_both_ways(pairs: Callable, what: str) -> None:
    """Here activations before the first token that differs differ too."""
    pair = pairs("bert")
    found = analyses.patch(pair.model, CLEAN, CORRUPT, what=what, answer=ANSWER, wrong=WRONG)
    check(found, densely(pair.twin, what, found.shape[1:]))
    with pytest.raises(ModelError, match="no activation"):
        analyses.patch(pair.model, CLEAN, CORRUPT, what="mlp")


@pytest.mark.parametrize("what", ["k", "v"])
def test_one_query_heads_view_of_shared_keys_and_values(pairs: Callable, what: str) -> None:
    """The same model with the shared heads written out is patched as any other."""
    pair = pairs("llama")
    found = analyses.patch(
        pair.model, CLEAN, CORRUPT, what=what, per="query_head", answer=ANSWER, wrong=WRONG
    )
    check(found, densely(dense_patching.ungrouped(pair.twin), what, (3, 4)))
    with pytest.raises(AnalysisError, match=f"2 query heads of .* share one head of {what}; say which"):
        analyses.patch(pair.model, CLEAN, CORRUPT, what=what)
    with pytest.raises(AnalysisError, match="queries are not shared"):
        analyses.patch(pair.model, CLEAN, CORRUPT, what="q", per="kv_head")


@pytest.mark.parametrize("how", ["denoise", "noise"])
@pytest.mark.parametrize("ablation", ["zero", "mean"])
def test_nothing_and_the_mean_in_the_cells_place(pairs: Callable, how: str, ablation: str) -> None:
    pair = pairs("gpt2")
    for what in ("head", "residual", "k"):
        found = analyses.patch(
            pair.model, CLEAN, CORRUPT, what=what, how=how, ablation=ablation, answer=ANSWER, wrong=WRONG
        )
        check(found, densely(pair.twin, what, found.shape[1:], how, ablation))
    with pytest.raises(AnalysisError, match="two or more pairs"):
        analyses.patch(pair.model, CLEAN[:1], CORRUPT[:1], ablation="mean")


def test_all_of_the_stream_is_all_of_the_difference(pairs: Callable) -> None:
    """One token differs, so the stream of that token in layer 0 carries everything, and a hidden one nothing."""
    model = pairs("llama").model
    corrupt = CLEAN.clone()
    corrupt[:, 2] = 50
    found = analyses.patch(model, CLEAN, corrupt, what="residual", layers=[0])
    np.testing.assert_allclose(found.values[:, 0, 2], 1, atol=1e-4)
    np.testing.assert_array_equal(found.values[:, 0, [0, 1]], 0)
    assert found.coords["layer"].values.tolist() == [0]


def test_pairs_of_several_lengths_and_pairs_without_a_difference(pairs: Callable) -> None:
    model = pairs("gpt2").model
    clean = ["w5 w17 w30 w8", "w40 w9 w3", "w7 w8 w9 w10"]
    corrupt = ["w5 w22 w30 w8", "w41 w9 w3", "w7 w8 w9 w10"]
    found = analyses.patch(model, clean, corrupt, what="residual", answer="w11", wrong="w12")
    assert found.shape == (3, 3, 4)
    assert found.attrs["undefined"] == 1
    assert np.isnan(found.values[2]).all()
    assert np.isnan(found.values[1, :, 3]).all()
    for n in range(2):
        alone = analyses.patch(model, clean[n], corrupt[n], what="residual", answer="w11", wrong="w12")
        np.testing.assert_allclose(found.values[n, :, : alone.shape[2]], alone.values[0], atol=1e-5)


def test_edits_stay_on(pairs: Callable) -> None:
    pair = pairs("gpt2")
    with pair.model.edit(hw.ScaleHeads({"1.2": 0.0})):
        found = analyses.patch(pair.model, CLEAN, CORRUPT, what="head", answer=ANSWER, wrong=WRONG)
    weight = pair.twin.transformer.h[1].attn.c_proj.weight
    kept = weight.detach().clone()
    try:
        with torch.no_grad():
            weight[16:24] = 0
        expected = densely(pair.twin, "head", (3, 4))
    finally:
        with torch.no_grad():
            weight.copy_(kept)
    np.testing.assert_allclose(found.values, expected, atol=2e-4)


def test_what_can_not_be_asked(pairs: Callable) -> None:
    model = pairs("gpt2").model
    for message, given in (
        ("pair 0 has 6 clean and 5 corrupt tokens", {"corrupt": CORRUPT[:, :5]}),
        ("2 clean and 1 corrupt", {"corrupt": CORRUPT[:1]}),
        ("what='heads' is unknown", {"what": "heads"}),
        ("measure='kl' is unknown", {"measure": "kl"}),
        ("position=7", {"position": 7}),
        ("one value per pair", {"measure": lambda logits: logits}),
        ("answer of pair 0 and the wrong token are both 'w4'; give two", {"answer": "w4", "wrong": "w4"}),
        ("different things", {"measure": difference, "answer": "w4"}),
    ):
        with pytest.raises(AnalysisError, match=message):
            analyses.patch(model, **{"clean": CLEAN, "corrupt": CORRUPT, **given})


def test_the_numbers_of_transformer_lens() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what TransformerLens' own dependencies say while they are imported
        pytest.importorskip("transformer_lens", reason=MISSING)
        from transformer_lens import patching
    plain, bridge = both("llama")
    model = hw.load(plain)
    ends = [difference(model(ids))[:1] for ids in (CLEAN, CORRUPT)]
    _, cache = quietly(bridge.run_with_cache, CLEAN[:1])
    for what, sweep, per in (
        ("head", "attn_head_out_all_pos", None), ("head_position", "attn_head_out_by_pos", None),
        ("residual", "resid_pre", None), ("mlp", "mlp_out", None), ("q", "attn_head_q_all_pos", None),
        ("k", "attn_head_k_all_pos", "kv_head"), ("v", "attn_head_v_all_pos", "kv_head"),
        ("pattern", "attn_head_pattern_all_pos", None),
    ):  # fmt: skip
        theirs = quietly(
            getattr(patching, f"get_act_patch_{sweep}"), bridge, CORRUPT[:1], cache,
            lambda logits: logits[0, -1, 11] - logits[0, -1, 20],
        )  # fmt: skip
        ours = analyses.patch(model, CLEAN[:1], CORRUPT[:1], what=what, per=per, answer="#11", wrong="#20")
        expected = ((theirs - ends[1]) / (ends[0] - ends[1])).detach().numpy()
        if what == "head_position":
            expected = expected.swapaxes(1, 2)
        np.testing.assert_allclose(ours.values[0], expected, atol=1e-4, rtol=1e-4, err_msg=what)
