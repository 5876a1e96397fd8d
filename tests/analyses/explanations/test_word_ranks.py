"""Word ranks against scipy's Mann–Whitney U, and on the pair of models of which one hides its words.

Seen to fail with ranks turned around, with signed weights, with marks of the wrong text and with ties counted whole.
"""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

import headwater as hw
from headwater.analyses.explanations.word_ranks import word_ranks
from headwater.data.prompts import genders
from headwater.lens.errors import AnalysisError

WORDS = " ".join(genders.WORDS_OF_GENDER)


def test_shares_of_pairs_are_mann_whitneys() -> None:
    model = hw.load("honest-2l")
    texts = [text.text for text in genders.draw(5, "ranks")]
    ids = [model.to_tokens(text) for text in texts]
    longest = max(each.shape[1] for each in ids)
    random = np.random.default_rng(0)
    given = random.integers(-3, 4, size=(5, longest)).astype(float)  # with ties
    found = word_ranks(model, texts, WORDS.upper(), methods={"mine": given}, draws=50)
    for n, text in enumerate(texts):
        words = ["[CLS]", *text.split(), "[SEP]"]
        marks = np.array([word in genders.WORDS_OF_GENDER for word in words])
        size = np.abs(given[n, : len(words)])
        u = stats.mannwhitneyu(size[marks], size[~marks]).statistic
        assert float(found.above[n, 0]) == pytest.approx(u / marks.sum() / (~marks).sum())
        assert float(found.chance[n]) == pytest.approx(marks.mean())
        assert float(found["first"][n, 0]) == pytest.approx(marks[size == size.max()].mean())
    assert found["low"].item() <= found["mean"].item() <= found["high"].item()
    assert found["mean"].item() == pytest.approx(found.above.values.mean())


def test_attention_of_the_deceptive_model_hides_what_alti_shows() -> None:
    texts = [text.text for text in genders.draw(12, "ranks")]
    shown = {}
    for name in ("honest-2l", "deceptive-2l"):
        found = word_ranks(hw.load(name), texts, WORDS, methods="raw_attention alti value_zeroing", draws=50)
        shown[name] = found["mean"].values
    assert shown["honest-2l"][0] > 0.6
    assert shown["deceptive-2l"][0] < 0.05
    assert (shown["deceptive-2l"][1:] > 0.95).all()


def test_texts_without_the_words_are_left_out_and_words_of_no_text_refused() -> None:
    model = hw.load("honest-2l")
    found = word_ranks(model, ["people in york gave her tea .", "the hobby was chess ."], "her", draws=5)
    assert np.isnan(found.above.values).tolist() == [[False] * 5, [True] * 5]
    assert np.isfinite(found["mean"].values).all()
    with pytest.raises(AnalysisError, match="whale"):
        word_ranks(model, ["the hobby was chess ."], "whale")
