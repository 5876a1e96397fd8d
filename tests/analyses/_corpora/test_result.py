"""What is asked of a corpus: heads by rank, examples, and errors in one line."""

from __future__ import annotations

import pytest

import headwater as hw


@pytest.fixture
def found(pairs, file) -> hw.Corpus:
    return hw.corpus(pairs("llama").model, file)


def test_heads_are_ranked(found) -> None:
    table = found.table()
    for lowest in (False, True):
        listed = found.find("entropy", 5, lowest=lowest)
        assert listed.entropy.tolist() == sorted(table.entropy, reverse=not lowest)[:5]
    only = found.find("entropy", 99, layer=1)
    assert [layer for layer, _ in only.index] == [1] * 4
    ninth = found.find("entropy", 1, decile=0.9)
    assert ninth.entropy.iloc[0] == found.deciles("entropy").sel(decile=0.9).max().item()


def test_every_array_says_what_it_is_not_for(found) -> None:
    for array in (found.mean("first"), found.deciles("first"), found.histogram("first"), found.distances()):
        assert array.attrs["not_for"]
        assert array.attrs["unit"]


def test_wrong_names_are_one_line(found) -> None:
    for wrong in (
        lambda: found.mean("entropies"), lambda: found.examples(9, 0), lambda: found.examples(0, 4),
        lambda: found.tokens(0, 0, "back"), lambda: found.find("first", decile=0.15),
    ):  # fmt: skip
        with pytest.raises(hw.HeadwaterError) as error:
            wrong()
        assert "\n" not in str(error.value)
