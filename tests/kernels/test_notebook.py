"""`notebook.py`: facts as HTML, in which nothing that a stranger wrote is more than text.

Seen to fail with cells that are not escaped, and with cells of any length.
"""

from __future__ import annotations

from html.parser import HTMLParser

from headwater.kernels.notebook import cell, listing, size, table

WORDS = "<script>alert('1')</script>&\x1b[31m\u202e\"x"


class Page(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.texts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_words_stay_words() -> None:
    shown = WORDS.replace("\x1b", "\\x1b").replace("\u202e", "\\u202e")
    page = Page(table(WORDS, {WORDS: WORDS, "none": None, "empty": "", "zero": 0}))
    assert set(page.tags) == {"div", "strong", "table", "tr", "th", "td"}
    assert page.texts == [shown, shown, shown, "zero", "0"]
    page = Page(listing([WORDS, "score"], [[WORDS, 0.123456], [1, float("nan")]]))
    assert set(page.tags) == {"table", "tr", "th", "td"}
    assert page.texts == [shown, "score", shown, "0.1235", "1", "nan"]


def test_cells_are_short() -> None:
    assert cell("a" * 10_000) == "a" * 239 + "…"
    assert size(5 * 2**40) == "5120.0 GiB"
