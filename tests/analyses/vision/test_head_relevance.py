"""Head relevance vectors, against attention by hand in float64.

Seen to fail with the rows of the other branch, with argmin, and without the first token's key.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")

import tiny_diffusers

import headwater as hw
from headwater.lens.errors import AnalysisError

PROMPTS = ["a red cat", "a dog"]
CONCEPTS = {"colour": "a {red} dog", "animal": "a red {cat}", "article": "{a} cat"}
PLACES = {"colour": 2, "animal": 3, "article": 1}  # of the word's token behind <bos>


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return hw.load(tiny_diffusers.pixel_pipeline(tmp_path_factory.mktemp("pixels") / "tiny"))


def keys_by_hand(model, attn, text):
    told = model.pipeline.tokenizer(text, return_tensors="pt").input_ids
    with torch.no_grad():
        states = model.pipeline.denoiser.caption_projection(
            model.pipeline.text_encoder(told).last_hidden_state
        )
        return attn.to_k(states)[0].unflatten(-1, (2, -1)).transpose(0, 1).double()


def weights_by_hand(model, prompt, seed):
    """[step, concept, layer, head] from the queries that a hook on to_q sees in a plain run."""
    seen = {}
    blocks = model.pipeline.denoiser.transformer_blocks
    hooks = [
        block.attn2.to_q.register_forward_hook(lambda m, a, out, n=n: seen.setdefault(n, []).append(out[1]))
        for n, block in enumerate(blocks)
    ]
    model.pipeline(prompt, seed=seed)
    for hook in hooks:
        hook.remove()
    found = np.zeros((3, 3, 2, 2))
    for layer, block in enumerate(blocks):
        words = [
            keys_by_hand(model, block.attn2, text.replace("{", "").replace("}", ""))
            for text in CONCEPTS.values()
        ]
        for step, q in enumerate(seen[layer]):
            q = q.double().unflatten(-1, (2, -1)).transpose(0, 1)
            for head in range(2):
                first = words[0][head, :1]
                own = [k[head, place : place + 1] for k, place in zip(words, PLACES.values(), strict=True)]
                scores = q[head] @ torch.cat([first, *own]).T / q.shape[-1] ** 0.5
                found[step, :, layer, head] = scores.softmax(-1).mean(0)[1:].numpy()
    return found


def test_vectors_are_counts_of_the_word_that_is_looked_at_most(model):
    found = hw.analyses.head_relevance(model, PROMPTS, concepts=CONCEPTS, draws=20, seed=5)
    by_hand = [weights_by_hand(model, prompt, 5 + n) for n, prompt in enumerate(PROMPTS)]
    np.testing.assert_allclose(found.weight, np.mean([w.mean(0) for w in by_hand], 0), atol=1e-5)
    counts = np.stack([(w.argmax(1)[:, None] == np.arange(3)[:, None, None]).mean(0) for w in by_hand])
    np.testing.assert_allclose(found.per_example, counts)
    total = counts.sum(0)
    for n in range(3):
        expected = 4 * total[n] / total[n].sum() if total[n].any() else total[n]
        np.testing.assert_allclose(found.relevance[n], expected)
    assert found.attrs["chance"] == 1 / 3


def test_concepts_may_be_a_text(model):
    told = "; ".join(f"{name}: {phrase}" for name, phrase in CONCEPTS.items())
    a, b = (hw.analyses.head_relevance(model, "a dog", concepts=each, draws=5) for each in (told, CONCEPTS))
    assert a.relevance.identical(b.relevance)


@pytest.mark.parametrize(
    ("concepts", "said"),
    [
        ({"animal": "{cat|dog}"}, "two or more names"),
        ({"animal": "{cat} {dog}", "colour": "red"}, "one pair of braces"),
        ("animal: cat; colour:", "two or more names"),
    ],
)
def test_concepts_that_are_none_are_refused(model, concepts, said):
    with pytest.raises(AnalysisError, match=said):
        hw.analyses.head_relevance(model, "a dog", concepts=concepts)


def test_models_that_draw_nothing_are_refused():
    for given in (hw.load(tiny_diffusers.pixart()), hw.load("tasks-4l")):
        with pytest.raises(AnalysisError, match="draws pictures"):
            hw.analyses.head_relevance(given, "a dog", concepts=CONCEPTS)
