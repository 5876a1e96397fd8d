"""Every figure of every page: it can be taken away as a page and as numbers, and its words say what is seen."""

from __future__ import annotations

import json
import re

import plotly.graph_objects as go
import pytest
from canvas_events import canvases
from opened_app import opened, settled

from headwater.dashboard import widgets
from headwater.dashboard.tables import to_csv

PROMPT = "When Mary and John went to the store , John gave a drink to"
CUT = {"edit": "Redistribute", "keys": [0], "keep": 0.4, "to": "others", "heads": ["0.1"], "layers": "all"}
EDITED = {"edits": json.dumps([CUT])}
VIEWS = {
    "heads": ("heads", {"heads.view": "scatter", "heads.curve": "true"}),
    "head": ("head", {}),
    "head, B - A": ("head", {"shown": "difference", **EDITED}),
    "flow": ("flow", {}),
    "sinks": ("sinks", {}),
    "circuits": ("circuits", {}),
    "edit": ("edit", {"edit.sweep": "true", "edit.control": "true", **EDITED}),
    "edit, map of A": ("edit", {"edit.map": "a", **EDITED}),
    "compare, maps": ("compare", {"compare.view": "map", **EDITED}),
    "compare, heads": ("compare", {"compare.view": "heads", **EDITED}),
    "compare, sinks": ("compare", {"compare.view": "sinks", **EDITED}),
    "catalogue": ("catalogue", {"catalogue.analysis": "rollout"}),
}
WITHOUT = ("card-",)  # pictures of links
FORMS = ("grid",)  # canvases of forms, whose ids end so


def charts(node):
    """The Plotly charts below a node of a page."""
    if getattr(node, "type", "") == "plotly_chart":
        yield node.proto
    for child in getattr(node, "children", {}).values():
        yield from charts(child)


@pytest.mark.parametrize("view", VIEWS)
def test_every_figure_is_taken_away_and_says_what_is_seen(offered, view, monkeypatch):
    page, more = VIEWS[view]
    shown, made = widgets.downloads, []

    def press(name, frame, key, figure=None):
        made.append((to_csv(frame), figure if figure is None or isinstance(figure, go.Figure) else figure()))
        shown(name, frame, key, figure)

    monkeypatch.setattr(widgets, "downloads", press)
    app = opened(page, model="small", prompt=PROMPT, **more)
    if page == "catalogue":
        app.button(key="run-analysis").click().run()
    settled(app)
    assert not app.exception
    found = [each for each in charts(app.main) if not any(name in each.id for name in WITHOUT)]
    labels = [button.proto.label for button in app.get("download_button")]
    drawn = len(found) + len([name for name in canvases(app) if name not in FORMS])
    assert drawn
    assert labels.count("HTML") >= drawn
    assert labels.count("CSV") >= drawn
    for numbers, figure in made:
        assert re.search(r"\n.*\d", numbers)
        assert figure is None or figure.data
    for each in found:
        assert re.search(r"\d", each.alt), each.alt
        assert json.loads(each.config)["toImageButtonOptions"]["format"] == "svg"
