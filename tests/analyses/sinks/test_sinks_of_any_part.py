"""Analyses of sinks on pictures, sound and two-sided texts, on each part of a model, against the plain model by hand.

Mutations seen to fail: the heads of the main part changed in the place of the part's, labels left behind.
"""

from __future__ import annotations

import any_input
import numpy as np
import pytest
import torch
from part_oracle import PartOracle
from torch import Tensor

from headwater import analyses
from headwater.lens.errors import AnalysisError
from headwater.lens.models.projections import projections


@pytest.fixture(scope="module", params=any_input.PARTS, ids="-".join)
def case(request: pytest.FixtureRequest) -> any_input.Case:
    return any_input.case(*request.param)


def paths_of(case: any_input.Case, what: str) -> set[str]:
    paths = {module: path for path, module in case.model.hf.named_modules()}
    if what == "attention":
        return {paths[case.model.attention_module(layer)] for layer in case.model.layers}
    return {paths[projections(case.model, layer).value.module] for layer in case.model.layers}


def test_no_value_at_the_sink(case: any_input.Case) -> None:
    """What changes where hooks set the values of the first key to zero in all layers of the part."""
    found = analyses.sink_contribution(case.model, case.tokens, controls=1, draws=5)

    def silence(module: torch.nn.Module, args: tuple, out: Tensor) -> Tensor:
        return torch.cat([torch.zeros_like(out[:, :1]), out[:, 1:]], 1)

    for row, one in enumerate(case.each):
        with torch.no_grad():
            before = case.plain(**one)
            handles = [
                case.plain.get_submodule(path).register_forward_hook(silence)
                for path in paths_of(case, "value")
            ]
            after = case.plain(**one)
            for handle in handles:
                handle.remove()
        if case.name == "clip":
            expected = (case.score(after) - case.score(before)).abs()
            np.testing.assert_allclose(
                found.similarity_change.sel(of="sinks")[row], expected[0], rtol=1e-4, atol=1e-9
            )
        else:
            p, q = (out.logits.log_softmax(-1) for out in (before, after))
            np.testing.assert_allclose(
                found.kl.sel(of="sinks")[row], (p.exp() * (p - q)).sum(-1).mean(), rtol=1e-3
            )


def test_attention_taken_off_the_sink(case: any_input.Case) -> None:
    """Redistributed weights are those of scores of -inf on the first key, where a query sees others."""
    found = analyses.redistribution_study(
        case.model,
        case.tokens,
        measure=lambda out: -case.loss(out, None),
        rule=None,
        keep="0",
        controls=1,
        draws=5,
    )
    part, touched = case.model.parts[case.model.part_name], paths_of(case, "attention")

    def scores(path: str, call: int, s: Tensor) -> Tensor:
        if path not in touched:
            return s
        s = s.clone()
        s[:, :, 1 if part.causal else 0 :, 0] = -torch.inf
        return s

    for row, one in enumerate(case.each):
        before = case.score(PartOracle().run(case.plain, lambda hf, one=one: hf(**one)))
        after = case.score(PartOracle(scores).run(case.plain, lambda hf, one=one: hf(**one)))
        np.testing.assert_allclose(found.plain[row], -before[0], rtol=1e-5)
        effect = found.effect.sel(treatment="sinks")[0, 0, row]
        np.testing.assert_allclose(effect, (before - after)[0], rtol=1e-3, atol=1e-9)
    case.plain.set_attn_implementation("eager")


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("vit_classifier", "vision"),
        ("clip", "text"),
        ("llava", "vision"),
        ("t5", "cross"),
        ("whisper", "encoder"),
    ],
)
def test_the_loss_of_each_kind_is_the_measure(name: str, part: str) -> None:
    case = any_input.case(name, part)
    tokens = case.tokens
    if case.name == "vit_classifier":
        tokens = tokens.changed(tokens.ids, tokens.mask)
        tokens.labels = torch.tensor([1, 2])
    found = analyses.redistribution_study(case.model, tokens, rule=None, keep="0", controls=1, draws=5)
    with torch.no_grad():
        for row, one in enumerate(case.each):
            out = case.plain(**one)
            if case.name == "clip":
                expected = case.score(out)[0]
            elif case.name == "vit_classifier":
                expected = torch.nn.functional.cross_entropy(out.logits, tokens.labels[row : row + 1])
            else:
                ids = one.get("decoder_input_ids", one.get("input_ids"))[0, 1:]
                kept = ids != case.model.image_token if case.name == "llava" else ids >= 0
                expected = torch.nn.functional.cross_entropy(out.logits[0, :-1][kept], ids[kept])
            np.testing.assert_allclose(found.plain[row], -expected, rtol=1e-5)


def test_words_are_drawn_where_there_are_words() -> None:
    for name, part in (("t5", "encoder"), ("t5", "decoder"), ("llava", "text")):
        case = any_input.case(name, part)
        one = case.tokens.rows([0])
        found = analyses.sink_inputs(case.model, one, draws=5)
        record = case.model.record(one, statistics=("received", "visible"), keep=())
        share = analyses.sink_rate(record).received_share_per_example
        np.testing.assert_allclose(found.received_share.sel(input="natural")[0], share[0], rtol=1e-5)
        assert not np.allclose(found.received_share[0], found.received_share[1])
    tower = any_input.case("vit_classifier", "vision")
    with pytest.raises(AnalysisError, match="this analysis draws words"):
        analyses.sink_inputs(tower.model, tower.tokens)


def test_positions_are_swapped_in_the_table_of_the_part() -> None:
    case = any_input.case("clip", "vision")
    found = analyses.position_swap(case.model, case.tokens, first=1, second=3, draws=5)
    table = case.plain.vision_model.embeddings.position_embedding.weight
    with torch.no_grad():
        table[[1, 3]] = table[[3, 1]]
    oracle = PartOracle()
    oracle.run(case.plain, lambda hf: hf(**case.each[0]))
    maps = [oracle.maps[path][0] for path in sorted(paths_of(case, "attention"))]
    expected = torch.stack([map.mean(2)[..., [1, 3]] for map in maps], 1)
    np.testing.assert_allclose(found.share.sel(version="swapped")[0], expected[0], rtol=1e-4)
    rotary = any_input.case("llava", "text")
    with pytest.raises(AnalysisError, match="has rotary positions"):
        analyses.position_swap(rotary.model, rotary.tokens)
