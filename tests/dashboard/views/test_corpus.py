"""The page Corpus: absent until a result is open, then a finder, one address for each head, and lit examples."""

from __future__ import annotations

from pathlib import Path

import pytest
from canvas_events import send
from opened_app import figure, opened, values

import headwater as hw
from headwater.dashboard import pages
from headwater.dashboard.figures import style
from headwater.dashboard.parts.corpora import lit, ranked
from headwater.dashboard.state import corpora

TEXTS = [
    "When Mary and John went to the store",
    "Mary gave a drink to John",
    "John and Mary went, John gave a drink",
]


@pytest.fixture(scope="module")
def result(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    for number, text in enumerate(TEXTS):
        (folder / f"{number}.txt").write_text(text)
    out = folder / "heads.safetensors"
    hw.corpus(hw.load("tasks-4l"), folder, out=out)
    return out


@pytest.fixture
def open_result(result, monkeypatch) -> hw.Corpus:
    monkeypatch.setattr(corpora, "_given", {})
    assert corpora.is_one(str(result))
    corpora.offer(str(result))
    return hw.Corpus.open(result)


def test_the_menu_has_the_page_when_a_result_is_open(monkeypatch, result) -> None:
    monkeypatch.setattr(corpora, "_given", {})
    assert "corpus" not in pages.shown()
    corpora.offer(str(result))
    assert list(pages.shown()) == [*pages.PAGES, "corpus"]


def test_heads_are_ranked_and_one_has_its_address(open_result) -> None:
    app = opened("corpus", **{"model": "tasks-4l", "corpus.by": "previous"})
    best = open_result.find("previous", 1).index[0]
    assert f"Head {best[0]}.{best[1]}" in [each.value for each in app.subheader]
    frame = ranked(open_result, "previous", [], lowest=False)
    assert frame["head"].tolist()[0] == f"{best[0]}.{best[1]}"
    assert len(frame) == 32
    assert (frame["10%"] <= frame["90%"]).all()
    assert {name.split(".")[0] for name in ranked(open_result, "previous", [2], lowest=True)["head"]} == {"2"}
    app = opened(
        "corpus", **{"model": "tasks-4l", "corpus.by": "self", "corpus.layer": "3", "corpus.head": "5"}
    )
    assert "Head 3.5" in [each.value for each in app.subheader]
    drawn = values(figure(app, "corpus-head")["data"][0], "y")
    wanted = open_result.deciles("self").sel(layer=3, head=5)
    assert drawn.tolist() == wanted.values.tolist()
    text = " ".join(each.value for each in app.markdown)
    for one in open_result.examples(3, 5, "self"):
        assert lit(one) in text
    assert any("Not for" in each.value for each in app.caption)


def test_a_click_on_a_tile_chooses_a_head(open_result) -> None:
    app = opened("corpus", model="tasks-4l")
    send(app, "corpus_grid", {"head": [1, 4]})
    assert "Head 1.4" in [each.value for each in app.subheader]
    assert app.query_params["corpus.head"] in ("4", ["4"])


def test_both_ends_are_lit_and_words_stay_letters(open_result) -> None:
    from headwater.analyses._corpora.result import Strong

    tokens = ["a"] * 40
    tokens[3], tokens[35] = "**x**](", "<b>"
    shown = lit(Strong(0.5, 0, "t", 35, 3, tokens))
    assert r":blue-background[\*\*x\*\*\]\(]" in shown
    assert r":orange-background[\<b\>]" in shown
    assert shown.count("…") == 2 - 1  # the gap; the text ends within sight
    assert ":violet-background[a]" in lit(Strong(0.5, 0, "t", 2, 2, ["b", "c", "a"]))


def test_figures_of_a_corpus(open_result) -> None:
    assert open_result.figure("previous").data
    one = hw.figure(open_result, statistic="self", layer=0, head=1)
    assert one.layout.meta == style.WIDE
    assert one.data[0].y.tolist() == open_result.deciles("self").sel(layer=0, head=1).values.tolist()
    assert sum(one.data[1].y) == pytest.approx(1)
    for wrong in ({"layer": 9, "head": 0}, {"statistic": "selves"}, {"query": 1}):
        with pytest.raises(hw.HeadwaterError):
            hw.figure(open_result, **wrong)
