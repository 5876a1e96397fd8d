"""A view as one web page: its numbers, the maps of pinned heads, and nothing that a hostile word could run."""

from __future__ import annotations

import html
import json
import re

import numpy as np
import pytest
from chromium import NEEDED
from opened_app import opened, settled
from word_models import word_model

import headwater as hw
from headwater.dashboard.export.report import report
from headwater.dashboard.running import jobs, measure, models, runs
from headwater.dashboard.running.pinned import pinned
from headwater.dashboard.state.state import State

TEXT = "When <s> Mary </s> $x$ gave </script><script>alert(1)</script> a drink to"
HOSTILE = (
    "</script><script>window.hit=1</script>", "<img/src=x/onerror=window.hit=1>", "<svg/onload=window.hit=1>",
    "\"onmouseover=\"window.hit=1", "'><iframe/src=http://evil.example/>", "\u202eevil", "\u2066evil", "$\\href{x}{y}$",
    "javascript:window.hit=1", "]]>", "<!--", "</details>", "</style>", "&lt;b&gt;",
)  # fmt: skip
CUT = {
    "edit": "AblateHeads",
    "heads": ["0.1"],
    "ablation": "zero",
    "examples": None,
    "seed": 0,
    "layers": "all",
}

pytestmark = pytest.mark.usefixtures("offered")


def made(**more) -> tuple[str, State, measure.Measure]:
    state = State(model="small", text=TEXT, **more)
    chosen = measure.of(state, runs.a(state))
    return report(state, chosen, ["<b>heads off</b>"]), state, chosen


def test_a_report_says_the_measure_of_both_runs_and_the_likeliest_answers():
    page, state, chosen = made(edits=[CUT])
    for run in (runs.a(state), runs.b(state)):
        assert f"<td>{chosen.value(run):.6g} nats</td>" in page
    told = re.search(r"Likeliest.*?<td>A ([\d.]+)", page, re.DOTALL)
    assert told is not None
    assert float(told[1]) == pytest.approx(np.exp(chosen.plain.log_probabilities()).max(), abs=1e-4)


def test_a_report_holds_the_map_of_each_pinned_head_in_both_runs_and_plotly_once():
    page, *_ = made(edits=[CUT], pins=["1.2", "0.1>2.3"])
    assert page.count("Plotly.newPlot(") == 2
    assert page.count("Head 1.2, run ") == 2
    assert "Edge 0.1 → 2.3" in html.unescape(page)
    assert page.count("plotly.js v") == 1
    assert not re.search(r"<script[^>]+src=", page)


def test_hostile_words_are_only_words():
    page, _, _ = made(edits=[CUT], pins=["1.2"])
    assert "<script>alert" not in page
    assert "<b>heads off" not in page
    assert "&lt;script&gt;alert(1)" in page


def test_pages_offer_the_report_and_each_figure_as_a_page():
    saved, head = opened("experiments", model="small"), opened("head", model="small", pins="0.1")
    assert "Report" in [each.label for each in saved.get("download_button")]
    assert [each.label for each in head.get("download_button")].count("HTML") >= 1


PINS = [
    {"analysis": "rollout", "settings": {"queries": [-1], "residual": 0.25}},
    {"analysis": "logit_lens", "settings": {}},
    {"analysis": "edge_attribution", "settings": {}},
    {"analysis": "rollout", "settings": {"queries": "x"}},
]


def test_pinned_results_are_those_of_the_library_and_say_when_there_are_none(small_model):
    state = State(model="small", text=TEXT, settings={"catalogue.pins": PINS})
    chosen = measure.of(state, runs.a(state))
    asked = pinned(state, runs.a(state), chosen)
    assert [bool(each.why) for each in asked] == [False, False, False, True]  # "x" is no position
    for each in asked[:1]:
        jobs.results.put(each.key, each.work())
    page = html.unescape(report(state, chosen, []))
    wanted = hw.analyses.rollout(hw.load(small_model).record(TEXT), queries=[-1], residual=0.25)
    told = [
        float(number)
        for number in re.findall(
            r"<td>([-+.e\d]+)</td></tr>", page[page.index("rollout: ") : page.index("Made with")]
        )
    ]
    assert told[: wanted.size] == pytest.approx(wanted.values.ravel(), rel=1e-5)
    assert page.count("was not computed before") == 2
    assert page.count("No result: ") == 3
    for each in asked:
        assert f"Not for: {each.asked.not_for}" in page


def test_a_page_computes_what_is_pinned_for_its_report():
    address = {"model": "small", "prompt": TEXT, "catalogue.pins": json.dumps(PINS[:1])}
    app = opened("experiments", **address)
    state = app.session_state["headwater"]
    chosen = measure.of(state, runs.a(state))
    jobs.results.__init__(jobs.results.most)  # as in a new process
    app.run()
    app.toggle(key="report-results").set_value(True).run()
    settled(app)
    assert all(each.result is not None for each in pinned(state, runs.a(state), chosen))
    page = report(state, chosen, [])
    assert page.count("Plotly.newPlot(") == 1
    assert "No result" not in page


@NEEDED[0]
@NEEDED[1]
def test_nothing_hostile_runs_or_is_asked_for_where_the_page_is_opened_from_disk(browser, tmp_path):
    name = "<img src=x onerror=window.hit=1>"
    models.allow(word_model(tmp_path / name, ["<bos>", "<unk>", *HOSTILE]))
    text = " ".join(HOSTILE) + "\n" + HOSTILE[0]
    state = State(
        model=name,
        text=text,
        b_text=text + " " + HOSTILE[2],
        pins=["0.1"],
        settings={"catalogue.pins": PINS[:2]},
    )
    chosen = measure.of(state, runs.a(state))
    for each in pinned(state, runs.a(state), chosen):
        jobs.results.put(each.key, each.work())
    (tmp_path / "report.html").write_text(report(state, chosen, [*HOSTILE]), encoding="utf-8")

    page, asked, faults = browser.new_page(), [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda said: faults.append(said.text) if said.type == "error" else None)
    page.goto((tmp_path / "report.html").as_uri())
    page.wait_for_function("document.querySelectorAll('.js-plotly-plot .main-svg').length >= 4")
    assert page.evaluate("window.hit") is None
    assert page.locator("img, iframe, [onload], [onerror], [onmouseover]").count() == 0
    assert page.inner_text("h1") == name
    assert "<svg/onload=window.hit=1>" in page.inner_text("pre")
    assert not any(mark in page.inner_text("body") for mark in ("\u202e", "\u2066"))
    assert [url for url in asked if not url.startswith(("file:", "data:", "blob:"))] == []
    assert len([url for url in asked if url.startswith("file:")]) == 1
    assert faults == []
    page.close()
