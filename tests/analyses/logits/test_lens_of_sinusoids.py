"""A decoder whose positions come from a table that is called with a size: seen to fail with a raw AttributeError."""

from __future__ import annotations

import pytest

from headwater import analyses
from headwater.lens.errors import AnalysisError
from headwater.lens.loading import zoo
from headwater.lens.loading.load import load


def test_a_decoder_with_norms_behind_the_sum_is_refused_by_name() -> None:
    model, given = load(zoo.build("marian")), zoo.inputs("marian", lengths=(9,))
    tokens = model.to_tokens(given.pop("input_ids"), given.pop("attention_mask"), **given)
    with pytest.raises(AnalysisError, match="can not be read off the stream of its decoder"):
        analyses.logit_lens(model, tokens, answer="#11")
