"""The dashboard's app in this process, on one of its pages."""

from __future__ import annotations

import base64
import json
import time
from pathlib import Path

import numpy as np
from streamlit.testing.v1 import AppTest

APP = Path(__file__).parents[2] / "dashboard" / "app.py"


def opened(page: str = "start", **address: str) -> AppTest:
    app = AppTest.from_file(str(APP), default_timeout=240)
    for name, value in address.items():
        app.query_params[name] = value
    if page != "start":
        app.switch_page(f"views/{page}.py")
    app.run()
    assert not app.exception
    return app


def settled(app: AppTest) -> AppTest:
    """The page once its jobs have ended."""
    for _ in range(100):
        if not any(button.label == "Cancel" for button in app.button):
            return app
        time.sleep(0.2)  # the jobs need the interpreter too
        app.run()
    raise AssertionError("the jobs of the page do not end")


def figure(app: AppTest, key: str) -> dict:
    """The Plotly figure whose key begins so, as the browser gets it."""
    for element in app.main:
        found = _find(element, key)
        if found:
            return found
    raise AssertionError(f"no figure {key}")


def _find(element, key: str) -> dict | None:
    proto = getattr(element, "proto", None)
    if getattr(element, "type", "") == "plotly_chart" and f"-{key}" in proto.id:
        return json.loads(proto.spec)
    for child in getattr(element, "children", {}).values():
        if found := _find(child, key):
            return found
    return None


def values(trace: dict, axis: str) -> np.ndarray:
    packed = trace[axis]
    flat = np.frombuffer(base64.b64decode(packed["bdata"]), dtype=packed["dtype"])
    return flat.reshape([int(n) for n in packed["shape"].split(",")]) if "shape" in packed else flat
