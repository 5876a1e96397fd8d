"""Small bars: heights are the numbers, names are what a reader can read, and no token becomes markup."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import numpy as np
import pytest

from headwater.dashboard.figures.small_bars import MOST, small_bars


class Read(HTMLParser):
    """Titles, heights and texts of the bars."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.titles, self.heights, self.words, self.alt = set(), [], [], [], None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        held = dict(attrs)
        self.tags.add(tag)
        self.alt = held.get("aria-label", self.alt)
        self.titles += [held["title"]] if "title" in held else []
        if found := re.search(
            r"min-width:1px;height:([\d.]+)%", held["style"] or "" if "style" in held else ""
        ):
            self.heights.append(float(found[1]))

    def handle_data(self, data):
        self.words.append(data)


def test_heights_and_words_are_those_of_the_tokens():
    read = Read(
        small_bars(np.array([0.2, 0.05, np.nan]), ["<img src=x>", "a", " b"], "share", 'what "is" seen')
    )
    assert read.heights == [100.0, 25.0, 0.0]
    assert read.titles == ["0 <img src=x>: 0.200 share", "1 a: 0.050 share", "2 ·b: 0.000 share"]
    assert read.tags == {"div"}
    assert read.alt == 'what "is" seen'
    assert read.words == ["at most 0.2 share", "<img src=…", "a", "·b"]


@pytest.mark.parametrize("count", [1, MOST, MOST + 1, 8192])
def test_of_many_tokens_a_bar_is_the_largest_of_its_block(count):
    values = np.random.default_rng(0).random(count)
    read = Read(small_bars(values, ["t"] * count, "share", ""))
    assert len(read.heights) <= MOST
    block = -(-count // MOST)
    expected = [values[at : at + block].max() / values.max() * 100 for at in range(0, count, block)]
    np.testing.assert_allclose(read.heights, expected, atol=0.051)
    places = [int(title.split()[0]) for title in read.titles]
    assert [values[place] for place in places] == [
        values[at : at + block].max() for at in range(0, count, block)
    ]


def test_nothing_received_draws_no_bar():
    assert Read(small_bars(np.zeros(3), ["a", "b", "c"], "share", "")).heights == [0.0] * 3


def test_a_patch_is_named_by_its_place():
    read = Read(small_bars(np.ones(3), ["<image> 0,3", "<image 2> 11,0", "<image>"], "share", ""))
    assert read.words[1:] == ["0,3", "11,0", "<image>"]
    assert read.titles[0].startswith("0 <image> 0,3:")
