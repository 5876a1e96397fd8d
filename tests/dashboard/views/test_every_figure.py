"""Every figure of every page: it can be taken away as a page and as numbers, and its words say what is seen."""

from __future__ import annotations

import json
import re

import pytest
from canvas_events import canvases
from opened_app import opened, settled

PROMPT = "When Mary and John went to the store , John gave a drink to"
CUT = {"edit": "Redistribute", "keys": [0], "keep": 0.4, "to": "others", "heads": ["0.1"], "layers": "all"}
MORE = {
    "heads": {"heads.view": "scatter", "heads.curve": "true"},
    "edit": {"edit.sweep": "true", "edit.control": "true", "edits": json.dumps([CUT])},
    "compare": {"compare.view": "sinks", "edits": json.dumps([CUT])},
    "catalogue": {"catalogue.analysis": "rollout"},
}
WITHOUT = ("card-", "edit-heads-grid")  # pictures of links, and the grid of a form


def charts(node):
    """The Plotly charts below a node of a page."""
    if getattr(node, "type", "") == "plotly_chart":
        yield node.proto
    for child in getattr(node, "children", {}).values():
        yield from charts(child)


@pytest.mark.parametrize(
    "page", ["heads", "head", "flow", "sinks", "circuits", "edit", "compare", "catalogue"]
)
def test_every_figure_is_taken_away_and_says_what_is_seen(offered, page):
    app = opened(page, model="small", prompt=PROMPT, **MORE.get(page, {}))
    if page == "catalogue":
        app.button(key="run-analysis").click().run()
    settled(app)
    assert not app.exception
    found = [each for each in charts(app.main) if not any(name in each.id for name in WITHOUT)]
    labels = [button.proto.label for button in app.get("download_button")]
    assert found
    drawn = len(found) + len({"map", "heads_grid"} & set(canvases(app)))
    assert labels.count("HTML") >= drawn
    assert labels.count("CSV") >= drawn
    for each in found:
        assert re.search(r"\d", each.alt), each.alt
        assert json.loads(each.config)["toImageButtonOptions"]["format"] == "svg"
