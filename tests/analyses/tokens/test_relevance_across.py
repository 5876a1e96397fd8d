"""Relevance through cross-attention against the paper's rules, dense, on torch's own gradients of eager float64 models.

Mutations seen to fail: R̄_ss not transposed, not normalised (either side), its identity left out, cross-attention taken
before the layer's own, the decoder's layers above it left out, the encoder's layers in the wrong order, padding of the
encoder not cut off.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import class_oracle
import numpy as np
import pytest
import torch
import transformers as hf
from ragged import VOCAB, padded
from torch import Tensor

import headwater as hw
from headwater.analyses.tokens.relevance import relevance
from headwater.lens.errors import AnalysisError, HeadwaterError
from headwater.lens.loading import zoo


@dataclass
class Twins:
    """A Headwater model, and the eager float64 model of the same weights."""

    model: hw.HookedModel
    twin: Any


def twins(plain: Any) -> Twins:
    return Twins(hw.load(copy.deepcopy(plain)), plain.double())


@pytest.fixture(scope="module")
def built() -> Callable[[str], Twins]:
    known: dict[str, Twins] = {}

    def get(name: str) -> Twins:
        if name not in known:
            known[name] = twins(zoo.build(name, seed=3))
        return known[name]

    return get


@pytest.fixture(params=["t5", "bart"])
def kind(request: pytest.FixtureRequest, built: Callable[[str], Twins]) -> Twins:
    return built(request.param)


def best(logits: Tensor) -> Tensor:
    """The logit of what the model predicts at the last position."""
    return logits[:, -1].max(-1).values


def dense(twin: Any, given: dict[str, Tensor], score: Callable[[Tensor], Tensor] = best) -> tuple[Any, Any]:
    """R_sq and R_ss of one text without padding: equations 5 to 10 of the paper, one after the other."""
    found = twin(**given, output_attentions=True)
    maps = (found.encoder_attentions, found.decoder_attentions, found.cross_attentions)
    flat = [map for side in maps for map in side]
    slopes = torch.autograd.grad(score(found.logits).sum(), flat, allow_unused=True)
    weighted = [
        torch.zeros_like(a)[0].mean(0) if g is None else (a * g)[0].relu().mean(0).detach()
        for a, g in zip(flat, slopes, strict=True)
    ]
    encoder, own, cross = (weighted[i * len(maps[1]) :][: len(maps[1])] for i in range(3))
    r_qq = torch.eye(len(encoder[0]), dtype=torch.float64)
    for a in encoder:
        r_qq = r_qq + a @ r_qq
    r_ss = torch.eye(len(own[0]), dtype=torch.float64)
    r_sq = torch.zeros(len(own[0]), len(r_qq), dtype=torch.float64)
    for a, c in zip(own, cross, strict=True):
        r_ss, r_sq = r_ss + a @ r_ss, r_sq + a @ r_sq
        r_sq = r_sq + shares(r_ss).T @ c @ shares(r_qq)
    return r_sq.numpy(), r_ss.numpy()


def shares(r: Tensor) -> Tensor:
    """R̄ of equations 8 and 9."""
    eye = torch.eye(len(r), dtype=r.dtype)
    rest = r - eye
    sums = rest.sum(-1, keepdim=True)
    return torch.where(sums > 0, rest / sums, 0) + eye


def sides(found: Any) -> tuple[np.ndarray, np.ndarray]:
    """Values on the encoder's tokens and on the decoder's."""
    return tuple(found.values[..., found.key_part.values == name] for name in ("encoder", "decoder"))


@pytest.mark.parametrize("side", ["right", "left"])
def test_unequal_lengths_on_both_sides(kind: Twins, side: str) -> None:
    source, source_mask = padded((9, 12, 1, 9), side=side)
    target, target_mask = padded((4, 7, 3, 1), seed=1)
    tokens = kind.model.to_tokens(
        source, source_mask, decoder_input_ids=target, decoder_attention_mask=target_mask
    )
    found = relevance(kind.model, tokens, queries=[-1, 0], batch_size=2)
    assert found.shape == (4, 2, 12 + 7)
    encoder, decoder = sides(found)
    for row in range(4):
        real, mine = source_mask[row].bool(), target_mask[row].bool()
        given = {"input_ids": source[row][real][None], "decoder_input_ids": target[row][mine][None]}
        r_sq, r_ss = dense(kind.twin, given)
        np.testing.assert_allclose(encoder[row][:, real.numpy()], r_sq[[-1, 0]], rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(decoder[row][:, mine.numpy()], r_ss[[-1, 0]], rtol=1e-3, atol=1e-5)
        assert np.isnan(encoder[row][:, ~real.numpy()]).all()
        assert np.isnan(decoder[row][:, ~mine.numpy()]).all()


def test_every_row_and_a_difference_at_an_earlier_position(kind: Twins) -> None:
    source, target = torch.arange(5, 16)[None], torch.arange(20, 26)[None]
    found = relevance(kind.model, source, queries="all", decoder=target, position=3, answer=[7], wrong=[9])
    r_sq, r_ss = dense(
        kind.twin,
        {"input_ids": source, "decoder_input_ids": target},
        lambda logits: logits[:, 3, 7] - logits[:, 3, 9],
    )
    encoder, decoder = sides(found)
    np.testing.assert_allclose(encoder[0], r_sq, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(decoder[0], r_ss, rtol=1e-3, atol=1e-5)
    assert found.attrs["position"] == 3
    assert (encoder[0][4:] == 0).all()  # what comes after the position explained takes no part


def test_the_start_token_alone(kind: Twins) -> None:
    source = torch.arange(5, 13)[None]
    found = relevance(kind.model, source)
    start = torch.tensor([[kind.model.start]])
    r_sq, r_ss = dense(kind.twin, {"input_ids": source, "decoder_input_ids": start})
    np.testing.assert_allclose(found.values[0], np.concatenate([r_sq, r_ss], 1), rtol=1e-3, atol=1e-5)
    assert found.key_part.values.tolist() == ["encoder"] * 8 + ["decoder"]
    assert found.key_token.values[0, 0] == "#5"


def test_sound_on_the_encoders_side(built: Callable[[str], Twins]) -> None:
    pair = built("whisper")
    features = torch.randn(2, zoo.MELS, zoo.FRAMES, generator=torch.Generator().manual_seed(2))
    target = torch.arange(20, 30).view(2, 5)
    found = relevance(pair.model, features, queries=[-1, 1], decoder=target)
    encoder, decoder = sides(found)
    for row in range(2):
        given = {"input_features": features[row][None].double(), "decoder_input_ids": target[row][None]}
        r_sq, r_ss = dense(pair.twin, given)
        np.testing.assert_allclose(encoder[row], r_sq[[-1, 1]], rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(decoder[row], r_ss[[-1, 1]], rtol=1e-3, atol=1e-5)


def test_one_head_and_frozen_weights() -> None:
    torch.manual_seed(1)
    sizes = {"d_model": 16, "d_kv": 16, "d_ff": 24, "num_layers": 3, "num_heads": 1, "vocab_size": VOCAB}
    plain = hf.T5ForConditionalGeneration._from_config(
        hf.T5Config(**sizes, decoder_start_token_id=0, pad_token_id=0), attn_implementation="eager"
    ).eval()
    pair = twins(plain)
    pair.model.hf.requires_grad_(False)
    source, target = torch.arange(5, 12)[None], torch.arange(30, 34)[None]
    r_sq, r_ss = dense(pair.twin, {"input_ids": source, "decoder_input_ids": target})
    found = relevance(pair.model, source, decoder=target)
    expected = np.concatenate([r_sq[-1], r_ss[-1]])
    np.testing.assert_allclose(found.values[0, 0], expected, rtol=1e-3, atol=1e-5)


def test_edits_of_one_part_are_those_of_scaled_weights(built: Callable[[str], Twins]) -> None:
    pair = built("bart")
    twin = copy.deepcopy(pair.twin)
    with torch.no_grad():
        twin.model.decoder.layers[1].encoder_attn.out_proj.weight[:, 8:16] *= (
            0.3  # head 1 of four, each 8 wide
        )
    source, target = torch.arange(5, 14)[None], torch.arange(20, 25)[None]
    r_sq, r_ss = dense(twin, {"input_ids": source, "decoder_input_ids": target})
    with pair.model.part("cross").edit(hw.ScaleHeads({"1.1": 0.3})):
        found = relevance(pair.model, source, decoder=target)
    expected = np.concatenate([r_sq[-1], r_ss[-1]])
    np.testing.assert_allclose(found.values[0, 0], expected, rtol=1e-3, atol=1e-5)
    with pair.model.part("cross").edit(hw.AblateHeads("all")):
        encoder, _ = sides(relevance(pair.model, source, decoder=target))
    assert (encoder == 0).all()


def test_refusals_name_value_and_mend(built: Callable[[str], Twins], pairs: Callable) -> None:
    model, ids = built("bart").model, torch.arange(5, 11)[None]
    for given, settings, message in [
        (model, {"position": 3}, "position=3, but example 0 has 1 tokens"),
        (model, {"queries": [4]}, "has 1 tokens"),
        (model, {"answer": [997]}, "answer=997 is no token"),
        (model.part("encoder"), {}, "reads its outputs at 6 positions of the encoder; name the rows"),
        (pairs("gpt2").model, {"decoder": ids}, "has no decoder beside an encoder"),
        (built("clip").model, {"measure": lambda x: x[:, 0, 0]}, "no image is given"),
    ]:
        with pytest.raises(HeadwaterError, match=message):
            relevance(given, ids, **settings)
    tokens = model.to_tokens(ids, decoder_input_ids=ids)
    with pytest.raises(AnalysisError, match="hold the decoder's tokens already"):
        relevance(model, tokens, decoder=ids)
    with pytest.raises(AnalysisError, match="batch_size=0 is outside its limits"):
        relevance(model, ids, batch_size=0)


def test_a_text_with_an_image_is_read_as_one_row(built: Callable[[str], Twins]) -> None:
    both, given = built("llava"), zoo.inputs("llava", lengths=(11, 8))
    found = relevance(both.model, both.model.to_tokens(**given), answer="#5")
    for row, length in enumerate((20, 17)):
        one = {name: tensor[row : row + 1] for name, tensor in given.items()}
        one = {name: t[:, :length] if t.dim() == 2 else t.double() for name, t in one.items()}
        expected = class_oracle.relevance(both.twin, lambda out: out.logits[:, -1, 5], **one)
        np.testing.assert_allclose(found[row, 0, :length], expected[0, -1], rtol=1e-4, atol=1e-6)
    assert found.key_token.values[0, 2] == "<image> 0,0"
