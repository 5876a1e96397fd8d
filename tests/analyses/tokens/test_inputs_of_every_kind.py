"""Attributions to patches, sound, words of both sides and words beside pictures, against plain models met by hooks.

Mutations seen to fail: patches in the order of columns, the decoder's side before the encoder's, word embeddings in the
place of the stream where pictures stand, blanks of zero, words replaced where a picture's places are, the mean of other
examples as the baseline, the class token among the patches that are blanked.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import input_oracle
import numpy as np
import pytest
import torch
import xarray as xr
from input_oracle import Case, Place, single
from torch import Tensor

import headwater as hw
from headwater.analyses.tokens.agreement import agreement
from headwater.analyses.tokens.blank_out import blank_out
from headwater.analyses.tokens.faithfulness import faithfulness
from headwater.analyses.tokens.input_gradient import input_gradient
from headwater.analyses.tokens.input_x_gradient import input_x_gradient
from headwater.analyses.tokens.integrated_gradients import integrated_gradients
from headwater.lens.errors import AnalysisError
from headwater.lens.loading import zoo

# family, part that is read, and the sides whose tokens its predictions are computed from
CASES = [
    ("vit_classifier", "vision", ["vision"]),
    ("clip", "vision", ["vision"]),
    ("clip", "text", ["text"]),
    ("llava", "vision", ["vision"]),
    ("llava", "text", ["text"]),
    ("t5", "decoder", ["encoder", "decoder"]),
    ("t5", "encoder", ["encoder"]),
    pytest.param("bart", "decoder", ["encoder", "decoder"], marks=pytest.mark.slow),
    ("whisper", "decoder", ["encoder", "decoder"]),
    pytest.param("wav2vec2", "audio", ["audio"], marks=pytest.mark.slow),
]


def entered(found: xr.DataArray, row: int, count: int) -> np.ndarray:
    """The values of a row where it has tokens of an input: no padding, no class token."""
    values = found.values[row]
    kept = values[~np.isnan(values)]
    assert len(kept) == count
    return kept


@pytest.mark.parametrize(("family", "part", "sides"), CASES)
def test_gradients_and_their_products_at_the_vectors_of_every_side(
    family: str, part: str, sides: list[str]
) -> None:
    case = input_oracle.case(family)
    model, places = case.model.part(part), case.places(sides)
    slope = input_gradient(model, case.tokens)
    share = input_x_gradient(model, case.tokens)
    for row in range(2):
        given = single(case.given, row)
        vectors = [place.vectors(given) for place in places]
        slopes = input_oracle.slopes_at(places, given, input_oracle.score_of(family), vectors)
        norms = torch.cat([each[0].norm(dim=-1) for each in slopes])
        products = torch.cat([(g * x)[0].sum(-1) for g, x in zip(slopes, vectors, strict=True)])
        size = float(products.abs().max())
        np.testing.assert_allclose(
            entered(slope, row, len(norms)), norms, rtol=2e-3, atol=1e-4 * float(norms.max())
        )
        np.testing.assert_allclose(entered(share, row, len(norms)), products, rtol=5e-3, atol=1e-3 * size)
    if len(sides) == 2:
        assert list(dict.fromkeys(slope.key_part.values)) == sides
    if sides == ["vision"]:
        assert slope.key_token.values[0][:3].tolist() == ["[CLS]", "0,0", "0,1"]
        assert np.isnan(slope.values[:, 0]).all()


@pytest.mark.parametrize(
    ("family", "part", "sides", "baseline"),
    [(*CASES[0], "zero"), (*CASES[0], "mean"), (*CASES[4], "mean"), (*CASES[5], "mean")],
)
def test_integrated_gradients_are_complete(family: str, part: str, sides: list[str], baseline: str) -> None:
    case = input_oracle.case(family)
    places = case.places(sides)
    found = integrated_gradients(case.model.part(part), case.tokens, baseline=baseline, tolerance=0.02)
    for row in range(2):
        given = single(case.given, row)
        ends = [place.vectors(given) for place in places]
        starts = [_start(each, place, baseline) for each, place in zip(ends, places, strict=True)]
        with torch.no_grad():
            whole = case.twin(**given)
            score = input_oracle.score_of(family, input_oracle.predicted(family, whole))
            change = float(score(whole)) - float(score(input_oracle.run_at(places, given, starts)))
        total = float(np.nansum(found.values[row])) + float(found.gap[row])
        assert total == pytest.approx(change, abs=2e-3 + 1e-3 * abs(change))
        points = 64
        sums = [torch.zeros_like(each) for each in ends]
        for n in range(points):
            at = [b + (n + 0.5) / points * (e - b) for b, e in zip(starts, ends, strict=True)]
            for total_of, each in zip(sums, input_oracle.slopes_at(places, given, score, at), strict=True):
                total_of += each / points
        expected = torch.cat([(s * (e - b))[0].sum(-1) for s, e, b in zip(sums, ends, starts, strict=True)])
        size = float(expected.abs().sum())
        np.testing.assert_allclose(entered(found, row, len(expected)), expected, atol=0.03 * size)


def _start(vectors: Tensor, place: Place, baseline: str) -> Tensor:
    if baseline == "zero":
        return torch.zeros_like(vectors)
    if place.kind == "output":
        return place.hf.get_submodule(place.path).weight.detach().mean(0).expand_as(vectors)
    return vectors.mean(1, keepdim=True).expand_as(vectors)


def test_the_baseline_of_blanks_is_the_example_with_nothing_but_its_mean() -> None:
    case = input_oracle.case("vit_classifier")
    found = integrated_gradients(case.model, case.tokens, baseline="blank")
    pixels = case.given["pixel_values"].double()
    with torch.no_grad():
        whole, empty = (
            case.twin(x).logits.log_softmax(-1)
            for x in (pixels, pixels.mean((2, 3), keepdim=True).expand_as(pixels))
        )
    change = (whole - empty).gather(1, whole.argmax(-1)[:, None])[:, 0]
    np.testing.assert_allclose(found.sum("key") + found.gap, change, atol=2e-3)


def _changes(case: Case, row: int, forms: list[Callable[[dict[str, Tensor]], Any]]) -> np.ndarray:
    """The score of one row less that of each of its forms."""
    given = single(case.given, row)
    with torch.no_grad():
        whole = case.twin(**given)
        score = input_oracle.score_of(case.family, input_oracle.predicted(case.family, whole))
        return np.array([float(score(whole)) - float(score(form(given))) for form in forms])


def _word(case: Case, name: str, place: int) -> Callable[[dict[str, Tensor]], Any]:
    """The row with token 4 in the place of one of its words."""

    def form(given: dict[str, Tensor]) -> Any:
        ids = given[name].clone()
        ids[0, place] = 4
        return case.twin(**{**given, name: ids})

    return form


def _patch(case: Case, place: int) -> Callable[[dict[str, Tensor]], Any]:
    """The row with one patch of its picture, of 4 × 4 pixels, three a row, at the mean colour of the picture."""
    y, x = 4 * (place // 3), 4 * (place % 3)

    def form(given: dict[str, Tensor]) -> Any:
        pixels = given["pixel_values"].clone()
        pixels[..., y : y + 4, x : x + 4] = given["pixel_values"].mean((2, 3), keepdim=True)
        return case.twin(**{**given, "pixel_values": pixels})

    return form


def _of_mean(case: Case, where: Place, name: str, place: int) -> Callable[[dict[str, Tensor]], Any]:
    """The row with one vector of a stream as the picture or sound gives it when it is nothing but its mean."""
    axes = (2, 3) if name == "pixel_values" else (2,)

    def form(given: dict[str, Tensor]) -> Any:
        plain = {**given, name: given[name].mean(axes, keepdim=True).expand_as(given[name])}
        empty = where.vectors(plain)

        def change(found: Tensor) -> Tensor:
            found = found.clone()
            found[:, place] = empty[:, place]
            return found

        return where.run(given, change)

    return form


@pytest.mark.parametrize("family", ["vit_classifier", "clip"])
def test_a_blank_patch_has_the_mean_colour_of_its_picture(family: str) -> None:
    case = input_oracle.case(family)
    found = blank_out(case.model.part("vision"), case.tokens, signed=True)
    for row in range(2):
        expected = _changes(case, row, [_patch(case, place) for place in range(9)])
        np.testing.assert_allclose(entered(found, row, 9), expected, atol=2e-5)
    assert found.attrs["blank"] == "the mean of each picture, sound or row of vectors"
    with pytest.raises(AnalysisError, match=r"blank='#3' names a token, and .* reads no words here"):
        blank_out(case.model.part("vision"), case.tokens, blank="#3")


def test_blank_words_beside_a_picture_and_blank_places_of_it() -> None:
    case = input_oracle.case("llava")
    found = blank_out(case.model, case.tokens, blank="#4", signed=True)
    stream = Place.of(case.twin, "llava", "text")
    for row, length in enumerate((20, 17)):
        forms = [
            _of_mean(case, stream, "pixel_values", n) if 2 <= n < 11 else _word(case, "input_ids", n)
            for n in range(length)
        ]
        expected = _changes(case, row, forms)
        np.testing.assert_allclose(entered(found, row, length), expected, atol=5e-4 * np.abs(expected).max())


def test_blank_words_on_both_sides() -> None:
    case = input_oracle.case("t5")
    found = blank_out(case.model, case.tokens, blank="#4", signed=True)
    for row, length in enumerate((11, 8)):
        forms = [_word(case, "input_ids", n) for n in range(length)]
        forms += [_word(case, "decoder_input_ids", n) for n in range(7)]
        expected = _changes(case, row, forms)
        np.testing.assert_allclose(
            entered(found, row, length + 7), expected, atol=1e-3 * np.abs(expected).max()
        )


def test_blank_sound_and_words() -> None:
    case = input_oracle.case("whisper")
    found = blank_out(case.model, case.tokens, blank="#4", signed=True)
    stream = Place.of(case.twin, "whisper", "encoder")
    forms = [_of_mean(case, stream, "input_features", n) for n in range(10)]
    forms += [_word(case, "decoder_input_ids", n) for n in range(7)]
    for row in range(2):
        expected = _changes(case, row, forms)
        np.testing.assert_allclose(entered(found, row, 17), expected, atol=1e-3 * np.abs(expected).max())


def test_curves_of_patches_begin_at_the_picture_and_end_at_its_mean() -> None:
    case = input_oracle.case("vit_classifier")
    weights = np.zeros((2, 10))
    weights[:, 1:] = np.arange(9)[::-1]  # patch after patch
    found = faithfulness(case.model, case.tokens, {"mine": weights}, steps=9, draws=5, kind="log_probability")

    def first(count: int) -> Callable[[dict[str, Tensor]], Any]:
        def form(given: dict[str, Tensor]) -> Any:
            pixels = given["pixel_values"].clone()
            for place in range(count):
                y, x = 4 * (place // 3), 4 * (place % 3)
                pixels[..., y : y + 4, x : x + 4] = given["pixel_values"].mean((2, 3), keepdim=True)
            return case.twin(pixel_values=pixels)

        return form

    for row in range(2):
        lost = _changes(case, row, [first(count) for count in range(10)])
        curve = found.deletion.sel(attribution="mine").values[row]
        np.testing.assert_allclose(curve[0] - curve, lost, atol=2e-5)
        np.testing.assert_allclose(
            found.insertion.sel(attribution="mine").values[row][[0, -1]], curve[[-1, 0]]
        )


def test_methods_are_compared_on_both_sides() -> None:
    case = input_oracle.case("t5")
    names = "raw_attention rollout relevance alti input_x_gradient"
    found = agreement(case.model, case.tokens, names, draws=5)
    assert found.agreement.shape == (2, 5, 5)
    assert not found.agreement.isnull().any()
    grad = np.abs(input_x_gradient(case.model, case.tokens).values)
    weights = {"one": grad, "two": input_gradient(case.model, case.tokens).values}
    by_hand = agreement(case.model, case.tokens, weights, draws=5)
    assert by_hand.agreement.sel(attribution="one", other="one").values.tolist() == [1, 1]
    across = agreement(case.model.part("cross"), case.tokens, names, draws=5)
    xr.testing.assert_allclose(across.agreement, found.agreement)
    with pytest.raises(
        AnalysisError, match=r"norms weighs the tokens of one side alone.*the encoder and the decoder"
    ):
        agreement(case.model, case.tokens, "norms alti", draws=5)
    with pytest.raises(
        AnalysisError, match=r"reads its outputs at 11 positions of the encoder.*without rows"
    ):
        agreement(case.model.part("encoder"), case.tokens.rows([0]), "relevance blank_out", draws=5)


def test_vectors_in_the_place_of_tokens() -> None:
    plain = zoo.build("llama", seed=3)
    model, twin = hw.load(copy.deepcopy(plain)), plain.double()
    vectors = torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(1))
    tokens = model.to_tokens(inputs_embeds=vectors)
    exact = vectors.double()
    score = lambda out: out.logits[:, -1].log_softmax(-1)  # noqa: E731
    leaf = exact.clone().requires_grad_()
    found = score(twin(inputs_embeds=leaf))
    chosen = found.argmax(-1)[:, None]
    slope = torch.autograd.grad(found.gather(1, chosen).sum(), leaf)[0]
    np.testing.assert_allclose(input_gradient(model, tokens), slope.norm(dim=-1), rtol=2e-3)
    shares = input_x_gradient(model, tokens)
    np.testing.assert_allclose(shares, (slope * exact).sum(-1), atol=1e-3 * float(shares.max()))
    changes = blank_out(model, tokens, signed=True)
    with torch.no_grad():
        for place in range(6):
            blanked = exact.clone()
            blanked[:, place] = exact.mean(1)
            lost = (found - score(twin(inputs_embeds=blanked))).gather(1, chosen)[:, 0]
            np.testing.assert_allclose(changes[:, place], lost.detach(), atol=1e-4)
