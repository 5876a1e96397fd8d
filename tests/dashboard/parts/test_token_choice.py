"""A token is chosen from a list, and among many by its position."""

from __future__ import annotations

import pytest
from opened_app import opened

pytestmark = pytest.mark.usefixtures("offered")
LONG = " ".join(["When Mary and John went to the store ,"] * 66)


def test_a_short_input_has_a_list():
    app = opened("head", prompt="When Mary gave a drink", query="2")
    assert app.selectbox(key="bound-query").value == 2


def test_a_long_one_has_a_position_and_finds_tokens():
    app = opened("head", prompt=LONG, query="9999")
    assert app.number_input(key="bound-query").value == 594
    app.number_input(key="bound-query").set_value(4).run()
    assert app.session_state["headwater"].query == 4
    app.text_input(key="bound-input-find").set_value("Mary").run()
    assert any("stands at 2" in each.value for each in app.caption)
