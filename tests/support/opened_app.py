"""The dashboard's app in this process, on one of its pages."""

from __future__ import annotations

from pathlib import Path

from streamlit.testing.v1 import AppTest

APP = Path(__file__).parents[2] / "dashboard" / "app.py"


def opened(page: str = "overview", **address: str) -> AppTest:
    app = AppTest.from_file(str(APP), default_timeout=240)
    for name, value in address.items():
        app.query_params[name] = value
    app.run()
    if page != "overview":
        app.switch_page(f"views/{page}.py").run()
    assert not app.exception
    return app
