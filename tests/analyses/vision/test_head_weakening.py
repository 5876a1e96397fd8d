"""Ordered weakening, against the outputs of heads scaled by hand.

Seen to fail with a factor of another sign, with the other branch, and with the two orders exchanged.
"""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("diffusers")

import tiny_diffusers

import headwater as hw
from headwater.lens.errors import AnalysisError

PROMPTS = ["a red cat", "a dog"]
CONCEPTS = {"colour": "a {red} dog", "animal": "a red {cat}", "article": "{a} cat"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return hw.load(tiny_diffusers.pixel_pipeline(tmp_path_factory.mktemp("pixels") / "tiny"))


def weakened_by_hand(model, prompt, seed, heads, factor):
    """The picture when the output of heads (layer, head) of attn2 is multiplied in the branch with words."""

    def scale(chosen):
        def put(module, args):
            z = args[0].clone().unflatten(-1, (2, -1))
            z[1, :, chosen] *= factor
            return (z.flatten(-2),)

        return put

    blocks = model.pipeline.denoiser.transformer_blocks
    hooks = [
        block.attn2.to_out[0].register_forward_pre_hook(scale([h for at, h in heads if at == layer]))
        for layer, block in enumerate(blocks)
    ]
    picture = model.pipeline(prompt, seed=seed)
    for hook in hooks:
        hook.remove()
    return np.asarray(picture, float)


def brightness(pictures, prompts):
    return [float(np.asarray(picture, float).mean()) for picture in pictures]


def test_weakening_goes_through_the_heads_in_their_order(model):
    found = hw.analyses.head_relevance(model, PROMPTS, concepts=CONCEPTS, draws=5)
    vector = found.relevance.copy(data=np.arange(12.0).reshape(3, 2, 2)[::-1])
    curve = hw.analyses.head_weakening(
        model, PROMPTS, "animal", brightness, vector, step=1, controls=2, draws=20, seed=3, factor=-2.0
    )
    assert curve.ranked.values.tolist() == ["1.1", "1.0", "0.1", "0.0"]
    order = [(1, 1), (1, 0), (0, 1), (0, 0)]
    for way, heads in (("most first", order), ("least first", order[::-1])):
        for count in range(5):
            expected = [
                weakened_by_hand(model, prompt, 3 + n, heads[:count], -2.0).mean()
                for n, prompt in enumerate(PROMPTS)
            ]
            at = curve.per_example.sel(order=way).isel(heads=count)
            np.testing.assert_allclose(at, expected, atol=1.0)  # greys are rounded
    area = curve.per_example.mean("heads")
    gap = (area.sel(order="least first") - area.sel(order="most first")).mean()
    assert float(curve.gap.sel(against="least first")) == pytest.approx(float(gap))
    random = area.sel(order=["random 0", "random 1"]).mean("order")
    expected = (random - area.sel(order="most first")).mean()
    assert float(curve.gap.sel(against="random")) == pytest.approx(float(expected))
    assert (curve.gap_low <= curve.gap).all()


def test_words_alone_leave_the_first_tokens_weights(model):
    vector = hw.analyses.head_relevance(model, "a dog", concepts=CONCEPTS, draws=5).relevance
    both = [
        hw.analyses.head_weakening(
            model, "a dog", "animal", None, vector, keys=keys, step=4, controls=0, draws=5
        )
        for keys in ("all", "words")
    ]
    assert [float(each.measure[0, 0]) for each in both] == [1.0, 1.0]
    assert float(both[0].measure[0, 1]) != float(both[1].measure[0, 1])


def test_what_does_not_fit_is_refused(model):
    vector = hw.analyses.head_relevance(model, "a dog", concepts=CONCEPTS, draws=5)
    with pytest.raises(AnalysisError, match="no concept 'colours'"):
        hw.analyses.head_weakening(model, "a dog", "colours", None, vector)
    with pytest.raises(AnalysisError, match=r"relevance= .* or concepts="):
        hw.analyses.head_weakening(model, "a dog", "colour")
    with pytest.raises(AnalysisError, match="one finite number for each of 1 pictures"):
        hw.analyses.head_weakening(model, "a dog", "colour", lambda pictures, prompts: [1.0, 2.0], vector)
