"""The tiles of heads: small maps as bytes, numbers with their scale, and the words for both."""

from __future__ import annotations

import json

import numpy as np
import pytest
import xarray as xr
from canvas_events import header_of, send
from streamlit.testing.v1 import AppTest

from headwater.dashboard.canvas import head_tiles
from headwater.dashboard.canvas.grid import grid
from headwater.dashboard.canvas.head_tiles import event_of
from headwater.dashboard.canvas.mosaic import MASKED, mosaic, side_for, small, weights_in


@pytest.fixture
def sent(monkeypatch):
    """Draw without a browser: the header and the numbers of the last picture."""
    given: list[dict] = []
    monkeypatch.setattr(
        head_tiles, "_tiles", lambda **now: given.append(now) or type("Result", (), {"event": None})
    )

    def last() -> tuple[dict, bytes]:
        data = given[-1]["data"]
        length = int.from_bytes(data[:4], "little")
        return json.loads(data[4 : 4 + length]), data[4 + -(-length // 4) * 4 :]

    return last


def test_a_small_map_is_the_root_of_the_largest_weight_of_each_block():
    weights = np.random.default_rng(0).random((64, 64), dtype=np.float32)
    weights[10, 3] = np.nan
    drawn = small(weights)
    assert drawn.dtype == np.uint8
    by_hand = [
        [np.nanmax(weights[2 * row : 2 * row + 2, 2 * column : 2 * column + 2]) for column in range(32)]
        for row in range(32)
    ]
    assert np.abs((drawn / 254.0) ** 2 - by_hand).max() < 0.004
    drawn[0, 31] = MASKED
    lines = weights_in({(1, 2): small(0 * weights), (3, 4): drawn}).query("layer == 3 and head == 4")
    assert len(lines) == 32 * 32 - 1
    known = lines["weight"] - np.asarray(by_hand)[lines["query block"], lines["key block"]]
    assert np.abs(known).max() < 0.004


def test_masked_pairs_and_zeros_differ():
    drawn = small(np.zeros((3, 3)), causal=True)
    assert drawn.tolist() == [[0, MASKED, MASKED], [0, 0, MASKED], [0, 0, 0]]
    assert small(np.full((1, 2), np.nan)).tolist() == [[MASKED, MASKED]]


def test_a_mosaic_leaves_missing_heads_out(sent):
    maps = {(1, 0): small(np.array([[1.0, 0.0], [0.75, 0.25]])), (3, 1): small(np.ones((2, 2)))}
    assert mosaic(maps, [1, 3], [0, 1], key="all", title="Maps", chosen=(3, 1), pins=[(1, 0)]) is None
    header, numbers = sent()
    assert (header["layers"], header["heads"], header["present"]) == ([1, 3], [0, 1], [0, 3])
    assert list(numbers[:8]) == [254, 0, 220, 127, 254, 254, 254, 254]
    assert header["alt"] == (
        "Maps. 2 layers of 2 heads. Largest weights beyond the first keys: 3.1 1.00, 1.0 0.25. Head 3.1 is chosen. "
        "Pinned: 1.0."
    )
    mosaic({}, [0], [0], key="all")
    assert sent()[0]["present"] == []


def test_the_mosaic_of_many_heads_stays_small(sent):
    for count in (144, 1024):
        layers, heads = range(count // 16), range(16)
        tile = small(np.ones((500, 500)), side_for(count))
        mosaic({(layer, head): tile for layer in layers for head in heads}, layers, heads, key="all")
        assert len(sent()[1]) <= 2**18


@pytest.mark.parametrize(
    "maps",
    [
        {(0, 0): np.ones((2, 2))},
        {(0, 0): np.ones((33, 2), np.uint8)},
        {(0, 0): np.ones((2, 2), np.uint8), (0, 1): np.ones((3, 2), np.uint8)},
        {(0, 0): np.ones(4, np.uint8)},
    ],
)
def test_maps_of_another_kind_are_refused(maps):
    with pytest.raises(ValueError, match="bytes"):
        mosaic(maps, [0], [0, 1], key="all")


def test_a_grid_diverges_where_a_number_is_negative(sent):
    values = xr.DataArray([[0.5, -2.0, np.nan]], dims=("layer", "head"), coords={"layer": [7]})
    grid(values, key="heads", title="Importance", unit="nats")
    header, numbers = sent()
    assert (header["low"], header["high"], header["signed"]) == (-2.0, 2.0, True)
    assert header["alt"] == "Importance. Largest: 7.1 -2, 7.0 0.5 (nats)."
    assert np.frombuffer(numbers, "<f4")[:2].tolist() == [0.5, -2.0]
    grid(values.transpose().clip(min=0), key="heads")
    assert (sent()[0]["low"], sent()[0]["high"], sent()[0]["signed"]) == (0.0, 0.5, False)
    grid(values, key="heads", limits=(0.0, 1.0))
    assert (sent()[0]["low"], sent()[0]["high"], sent()[0]["signed"]) == (0.0, 1.0, False)
    grid(values * np.nan, key="heads")
    assert sent()[0]["alt"] == "No head has a number."


@pytest.mark.parametrize(
    ("raw", "event"),
    [
        ({"head": [2, 0]}, {"head": (2, 0)}),
        ({"pin": [5, 1]}, {"pin": (5, 1)}),
        ({"head": [3, 0]}, None),
        ({"head": [2, 9]}, None),
        ({"head": [True, 0]}, None),
        ({"head": "2.0"}, None),
        ({}, None),
        (None, None),
    ],
)
def test_only_heads_that_are_there_are_handed_on(raw, event):
    assert event_of(raw, [2, 5], [0, 1]) == event


def test_a_page_hears_a_click_once_and_before_it_runs():
    def page() -> None:
        import numpy as np
        import streamlit as st
        import xarray as xr

        from headwater.dashboard.canvas.attention_map import attention_map
        from headwater.dashboard.canvas.grid import grid

        heard = st.session_state.setdefault("heard", [])
        st.text(f"{heard}")
        grid(xr.DataArray(np.eye(2), dims=("layer", "head")), key="heads", on_event=heard.append)
        event = attention_map(np.eye(3), "abc", "abc", key="map", first=(5, 5))
        st.text(f"{event}")

    app = AppTest.from_function(page, default_timeout=60).run()
    send(app, "heads", {"head": [1, 0]})
    assert [text.value for text in app.text] == ["[{'head': (1, 0)}]", "None"]
    send(app, "map", {"cell": [7, 5]})
    assert [text.value for text in app.text] == ["[{'head': (1, 0)}]", "{'cell': (7, 5)}"]
    app.run()
    assert [text.value for text in app.text] == ["[{'head': (1, 0)}]", "None"]
    assert header_of(app, "map")["first"] == [5, 5]
    assert not app.exception
