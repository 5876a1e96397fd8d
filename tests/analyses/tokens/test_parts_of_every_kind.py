"""What attention carries in towers of pictures, encoders, decoders and across, against dense float64 vectors of plain
models.

Mutations seen to fail:
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import input_oracle
import numpy as np
import part_mixing
import pytest
import torch
import transformers
from input_oracle import Case, single
from torch import Tensor

import headwater as hw
from headwater.analyses._prompts.examples import Batch
from headwater.analyses._streams.attention_terms import mixings
from headwater.analyses.tokens.alti import alti
from headwater.analyses.tokens.globenc import globenc
from headwater.analyses.tokens.gradient_rollout import gradient_rollout
from headwater.analyses.tokens.norms import norms
from headwater.analyses.tokens.relevance import relevance
from headwater.analyses.tokens.value_zeroing import value_zeroing
from headwater.lens.errors import AnalysisError

STACKS = [
    ("vit_classifier", "vision"),
    ("clip", "vision"),
    ("clip", "text"),
    ("llava", "vision"),
    ("llava", "text"),
    ("t5", "encoder"),
    ("whisper", "encoder"),
    pytest.param("bart", "encoder", marks=pytest.mark.slow),
]
CROSSING = [("t5", "cross"), ("bart", "cross"), pytest.param("whisper", "cross", marks=pytest.mark.slow)]


def real(values: np.ndarray) -> np.ndarray:
    """A row [query, key] without the columns of padding."""
    return values[..., ~np.isnan(values).all(tuple(range(values.ndim - 1)))]


def product(maps: list[Tensor]) -> np.ndarray:
    found = torch.eye(maps[0].shape[-1], dtype=torch.float64)
    for each in maps:
        found = each @ found
    return found.numpy()


def with_residual(layer: part_mixing.Mixed) -> Tensor:
    """The terms y_ij [query, key, d], with x_i where i = j."""
    found = layer.heads.sum(0)
    found[range(len(layer.x)), range(len(layer.x))] += layer.x
    return layer.through(found)


@pytest.mark.parametrize(("family", "part"), STACKS)
def test_norms_products_and_shares_of_one_part(family: str, part: str) -> None:
    case = input_oracle.case(family)
    model, tokens = case.model.part(part), case.tokens
    lengths = norms(model, tokens, queries=[-1, 1])
    plain = norms(model, tokens, queries=[-1, 1], stage="attention").norm
    encoded = globenc(model, tokens, queries=[-1, 1], normalise=True) if family != "bart" else None
    shares = alti(model, tokens, queries=[-1, 1])
    for row in range(2):
        found = part_mixing.layers(case.twin, family, part, single(case.given, row))
        for place, layer in enumerate(found):
            terms = with_residual(layer)
            expected = terms.norm(dim=-1)[[-1, 1]]
            np.testing.assert_allclose(real(lengths.norm.values[row, place]), expected, rtol=1e-3, atol=1e-5)
            own = terms[range(len(terms)), range(len(terms))]
            others = (terms.sum(1) - own).norm(dim=-1)
            ratio = (others / (others + own.norm(dim=-1)))[[-1, 1]]
            np.testing.assert_allclose(lengths.mixing_ratio.values[row, place], ratio, rtol=1e-3)
            bare = layer.heads.sum(0).norm(dim=-1)[[-1, 1]]
            np.testing.assert_allclose(real(plain.values[row, place]), bare, rtol=1e-3, atol=1e-5)
        if encoded is not None:
            maps = [with_residual(layer).norm(dim=-1) for layer in found]
            maps = [each / each.sum(-1, keepdim=True) for each in maps]
            np.testing.assert_allclose(
                real(encoded.values[row]), product(maps)[[-1, 1]], rtol=1e-3, atol=1e-5
            )
        expected = product([near(layer.whole, with_residual(layer)) for layer in found])[[-1, 1]]
        np.testing.assert_allclose(real(shares.values[row]), expected, atol=2e-4)


def near(whole: Tensor, terms: Tensor) -> Tensor:
    """ALTI's rows from outputs [query, d] and terms [query, key, d]."""
    found = (whole.abs().sum(-1, keepdim=True) - (whole[:, None] - terms).abs().sum(-1)).clamp_min(0)
    found[found < 1e-12] = 0
    return found / found.sum(-1, keepdim=True)


@pytest.mark.parametrize(("family", "part"), CROSSING)
def test_norms_in_cross_attention(family: str, part: str) -> None:
    case = input_oracle.case(family)
    model, tokens = case.model.part(part), case.tokens
    found = norms(model, tokens, queries="all")
    heads = norms(model, tokens, queries="all", per_head=True, stage="attention").norm
    assert "mixing_ratio" not in found
    for row in range(2):
        for place, layer in enumerate(part_mixing.layers(case.twin, family, part, single(case.given, row))):
            expected = layer.heads.sum(0).norm(dim=-1)
            np.testing.assert_allclose(real(found.norm.values[row, place]), expected, rtol=1e-3, atol=1e-5)
            expected = layer.heads.norm(dim=-1)
            np.testing.assert_allclose(real(heads.values[row, place]), expected, rtol=1e-3, atol=1e-5)
    with pytest.raises(AnalysisError, match='no key of cross-attention; use stage="attention"'):
        norms(model, tokens, stage="norm")


@pytest.mark.parametrize("family", ["t5", "bart", pytest.param("whisper", marks=pytest.mark.slow)])
def test_alti_through_both_sides(family: str) -> None:
    case = input_oracle.case(family)
    found = alti(case.model, case.tokens, queries="all")
    np.testing.assert_allclose(found.sum("key"), 1, atol=1e-6)
    for row in range(2):
        given = single(case.given, row)
        encoder, own, cross = (
            part_mixing.layers(case.twin, family, part, given) for part in ("encoder", "decoder", "cross")
        )
        source = torch.eye(len(encoder[0].x), dtype=torch.float64)
        for layer in encoder:
            source = near(layer.whole, with_residual(layer)) @ source
        target = torch.eye(len(own[0].x), dtype=torch.float64)
        across = torch.zeros(len(target), len(source), dtype=torch.float64)
        for mine, other in zip(own, cross, strict=True):
            step = near(mine.whole, with_residual(mine))
            target, across = step @ target, step @ across
            terms = torch.cat([other.through(other.heads.sum(0)), other.through(other.x)[:, None]], 1)
            shares = near(other.whole, terms)
            across = shares[:, -1:] * across + shares[:, :-1] @ source
            target = shares[:, -1:] * target
        values = found.values[row]
        for name, expected in (("encoder", across), ("decoder", target)):
            mine = real(values[:, found.key_part.values == name])
            np.testing.assert_allclose(mine, expected, atol=5e-4)


@pytest.mark.parametrize(("family", "part"), [*STACKS[:2], *STACKS[4:]])
def test_value_zeroing_of_one_part(family: str, part: str) -> None:
    case = input_oracle.case(family)
    found = value_zeroing(case.model.part(part), case.tokens, queries="all")
    for row in range(2):
        maps = []
        for layer in range(2):
            changes = part_mixing.without_values(case.twin, family, part, single(case.given, row), layer)
            maps.append(changes / changes.sum(-1, keepdim=True))
        values = real(found.values[row])
        np.testing.assert_allclose(values[: len(maps[0])], product(maps), atol=2e-3)


@pytest.mark.parametrize(("family", "part"), CROSSING)
def test_value_zeroing_in_cross_attention(family: str, part: str) -> None:
    case = input_oracle.case(family)
    model = case.model.part(part)
    found = value_zeroing(model, case.tokens, queries="all", first_layer=1, last_layer=1)
    for row in range(2):
        changes = part_mixing.without_values(case.twin, family, part, single(case.given, row), 1)
        expected = changes / changes.sum(-1, keepdim=True)
        np.testing.assert_allclose(real(found.values[row]), expected, atol=2e-3)
    for view in (model, case.model):
        with pytest.raises(AnalysisError, match=r"value_zeroing of several layers follows .*take the part"):
            value_zeroing(view, case.tokens)
    for analysis in (globenc, gradient_rollout):
        with pytest.raises(AnalysisError, match=r"follows maps from layer to layer; the keys of cross"):
            analysis(model, case.tokens)


def weighted(case: Case, part: str, given: dict[str, Tensor], score: Callable[[Any], Tensor]) -> list[Tensor]:
    """mean_h relu(∂s/∂A ⊙ A) of each layer of a part, [query, key], with the weights that attention modules give."""
    block, attention, *_ = part_mixing.MODULES[case.family, part]
    kept: list[Tensor] = []

    def keep(module: Any, args: Any, out: Any) -> None:
        kept.append(next(x for x in reversed(out) if isinstance(x, Tensor) and x.dim() == 4))

    handles = [
        case.twin.get_submodule(f"{block.format(layer)}.{attention}").register_forward_hook(keep)
        for layer in range(2)
    ]
    try:
        found = score(case.twin(**given, output_attentions=True)).sum()
    finally:
        for handle in handles:
            handle.remove()
    slopes = torch.autograd.grad(found, kept)
    return [(a * g).clamp_min(0).mean(1)[0].detach() for a, g in zip(kept, slopes, strict=True)]


READ = [  # family, part, the row that its outputs read (None: all, so that rows are named)
    ("vit_classifier", "vision", 0),
    ("clip", "vision", 0),
    ("clip", "text", -1),
    ("llava", "text", -1),
    ("llava", "vision", None),
    ("t5", "encoder", None),
    ("whisper", "encoder", None),
]


@pytest.mark.parametrize(("family", "part", "read"), READ)
def test_relevance_and_gradient_rollout_of_one_part(family: str, part: str, read: int | None) -> None:
    case = input_oracle.case(family)
    model, tokens = case.model.part(part), case.tokens
    if (family, part) == ("clip", "text"):  # the text is read at its largest id, here the last one
        ids = case.given["input_ids"].clamp(max=80)
        ids[[0, 1], [10, 7]] = 89
        case = replace(case, given=case.given | {"input_ids": ids})
        tokens = case.tokens
    rows: dict[str, Any] = {} if read is not None else {"queries": [2]}
    if read is None:
        with pytest.raises(
            AnalysisError, match=rf"reads its outputs at \d+ positions of the {part}; name the rows"
        ):
            relevance(model, tokens)
    found = relevance(model, tokens, **rows)
    rolled = gradient_rollout(model, tokens, **rows)
    for row in range(2):
        given = single(case.given, row)
        maps = weighted(case, part, given, _logit(family))
        eye = torch.eye(len(maps[0]), dtype=torch.float64)
        picked = 2 if read is None else read
        values = real(found.values[row])[0]
        expected = product([a + eye for a in maps])[picked]
        np.testing.assert_allclose(values, expected, rtol=2e-3, atol=1e-4 * expected.max())
        shares = [(a + eye) / (a + eye).sum(-1, keepdim=True) for a in maps]
        np.testing.assert_allclose(real(rolled.values[row])[0], product(shares)[picked], rtol=2e-3, atol=1e-5)
    if part == "vision":
        assert found.key_row.values[0, :3].tolist() == [-1, 0, 0]
        assert found.key_column.values[0, :3].tolist() == [-1, 0, 1]


def _logit(family: str) -> Callable[[Any], Tensor]:
    """What relevance explains: the logit of the prediction, or how similar a text and its own picture are."""
    if family == "clip":
        return input_oracle.score_of("clip")
    return lambda out: (out.logits if out.logits.dim() == 2 else out.logits[:, -1]).max(-1).values


def test_a_layer_that_nothing_reads_is_passed_by() -> None:
    plain = copy.deepcopy(input_oracle.case("llava").twin).float()
    plain.config.vision_feature_layer = -2  # the stream in front of the last layer
    tower = hw.load(plain).part("vision")
    with pytest.raises(AnalysisError, match="reads its outputs at 9 positions of the vision"):
        relevance(tower, input_oracle.case("llava").tokens)


def test_cross_attention_whose_module_holds_the_norm() -> None:
    """BLIP-2's learned queries look at the picture by modules built like BERT's."""
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    text = {
        "model_type": "opt",
        "vocab_size": 97,
        "ffn_dim": 48,
        "word_embed_proj_dim": 32,
        "pad_token_id": 0,
    }
    config = transformers.Blip2Config(
        vision_config=shape | {"image_size": 16, "patch_size": 8},
        qformer_config=shape | {"encoder_hidden_size": 32, "vocab_size": 30},
        text_config=shape | text, num_query_tokens=4, image_token_id=90,
    )  # fmt: skip
    torch.manual_seed(3)
    plain = transformers.Blip2ForConditionalGeneration._from_config(
        config, attn_implementation="eager"
    ).eval()
    plain.qformer.layernorm.weight.data.uniform_(0.5, 2)
    ids = torch.cat([torch.full((1, 4), 90), torch.arange(5, 11)[None]], 1)
    given = {"input_ids": ids, "pixel_values": torch.randn(1, 3, 16, 16)}
    model = hw.load(copy.deepcopy(plain)).part("cross")
    tokens = model.to_tokens(**given)
    plain = plain.double()
    given["pixel_values"] = given["pixel_values"].double()
    layer = part_mixing.layers(plain, "blip2", "cross", given, count=1)[0]
    found = norms(model, tokens, queries="all").norm
    np.testing.assert_allclose(found.values[0, 0], layer.heads.sum(0).norm(dim=-1), rtol=1e-3, atol=1e-6)
    mixing = mixings(model, Batch(tokens, [0]))[0]
    torch.testing.assert_close(mixing.entering[0], layer.x, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(mixing.mixed[0], layer.whole, atol=1e-5, rtol=1e-4)
    assert mixing.first is not None
    terms = mixing.total(True, (mixing.first,))[0]
    expected = layer.through(layer.heads.sum((0, 2)) + layer.x)
    torch.testing.assert_close(terms, expected, atol=1e-5, rtol=1e-3)
    assert alti(model, tokens).sum() == pytest.approx(1, abs=1e-6)
    with pytest.raises(AnalysisError, match="are of its text, not of the qformer; name the rows"):
        relevance(model, tokens)
