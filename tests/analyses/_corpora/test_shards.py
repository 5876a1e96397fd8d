"""Shards are i/n, counted from 1, and together the whole."""

from __future__ import annotations

import pytest

from headwater.analyses._corpora.shards import Shard
from headwater.lens.errors import AnalysisError


@pytest.mark.parametrize("of", [1, 2, 3, 7])
def test_together_they_take_everything_once(of) -> None:
    takers = [
        [n for n in range(1, of + 1) if Shard.checked((n, of), AnalysisError).takes(row)] for row in range(20)
    ]
    assert takers == [[row % of + 1] for row in range(20)]


@pytest.mark.parametrize("given", [(0, 2), (3, 2), (1, 0), (1.0, 2), (True, 2), (-1, 2)])
def test_those_that_do_not_exist_are_refused(given) -> None:
    with pytest.raises(AnalysisError, match="does not exist; give 1/"):
        Shard.checked(given, AnalysisError)


@pytest.mark.parametrize("text", ["3", "a/b", "1/", "/2", "-1/2", "1/2/3", "²/3", ""])
def test_what_is_no_shard_is_refused(text) -> None:
    with pytest.raises(AnalysisError, match="can not be read; write it as 3/8"):
        Shard.parse(text, AnalysisError)


def test_a_shard_is_read() -> None:
    assert Shard.parse("2/3", AnalysisError) == (2, 3)
