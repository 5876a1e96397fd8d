"""What a canvas sends when it is clicked, for pages run by `AppTest`, which has no browser."""

from __future__ import annotations

import json
from typing import Any

from streamlit.components.v2.bidi_component.main import _make_trigger_id
from streamlit.testing.v1 import AppTest


def canvases(app: AppTest) -> dict[str, Any]:
    """The messages of the canvases on the page, by their keys: header and numbers in ``.bytes``."""
    found = [node.proto for node in app.get("bidi_component")]
    return {proto.id.rsplit("-", 1)[1]: proto for proto in found}


def header_of(app: AppTest, key: str) -> dict[str, Any]:
    """What a canvas was told to show, without its numbers."""
    data = canvases(app)[key].bytes
    return json.loads(data[4 : 4 + int.from_bytes(data[:4], "little")])


def send(app: AppTest, key: str, event: dict[str, Any]) -> AppTest:
    """Run the page once more as after ``event`` of the canvas ``key``, such as {"cell": [3, 1]}."""
    states = app._tree.get_widget_states()
    told = states.widgets.add()
    told.id = _make_trigger_id(canvases(app)[key].id, "events")
    told.json_trigger_value = json.dumps([{"event": "event", "value": event}])
    return app._run(states)
