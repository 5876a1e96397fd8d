"""The canvases in a real browser: what is shown, what is sent, and what a hostile token can not do."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from chromium import NEEDED

from headwater.dashboard.canvas.packing import packed, text_of

pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = NEEDED

APP = """
import numpy as np, streamlit as st, xarray as xr
from headwater.dashboard.canvas.attention_map import attention_map
from headwater.dashboard.canvas.grid import grid
from headwater.dashboard.canvas.mosaic import mosaic, small
held = st.session_state
held.setdefault("events", [])
held["runs"] = held.get("runs", 0) + 1
tokens = ["<bos>", "<img src=x onerror='window.hit=1'>", "\\u202eevil", "$x$", "the", "the"]
weights = np.tril(np.arange(1.0, 37).reshape(6, 6) / 40)
weights[:, 0] = 1.0
chosen = next((event["cell"] for event in held["events"][::-1] if "cell" in event), None)
attention_map(weights, tokens, tokens, key="map", title="Head <b>0.0</b>", causal=True, chosen=chosen,
              received=weights.sum(0), on_event=held["events"].append)
maps = {(layer, head): small(weights, causal=True) for layer in (0, 1) for head in (0, 1)}
event = mosaic(maps, [0, 1], [0, 1], key="mosaic")
held["events"] += [event] if event else []
grid(xr.DataArray([[1.0, -1.0], [0.5, 0.25]], dims=("layer", "head")), key="grid", on_event=held["events"].append)
st.text(f"runs {held['runs']} events {held['events']}")
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[str]:
    app = tmp_path_factory.mktemp("canvas") / "app.py"
    app.write_text(APP, encoding="utf-8")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "streamlit", "run", str(app), "--server.address=127.0.0.1", f"--server.port={port}",
        "--server.headless=true", "--server.fileWatcherType=none", "--browser.gatherUsageStats=false",
    ]  # fmt: skip
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=Path(__file__).parents[2]
    )
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/_stcore/health", timeout=5).close()
                break
            except OSError:
                time.sleep(0.25)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(60)


class Opened:
    """A page of the small app: where its cells are, and what it has told the server."""

    def __init__(self, browser, server: str, **look) -> None:
        self.page = browser.new_page(viewport={"width": 1100, "height": 1500}, **look)
        self.page.set_default_timeout(90_000)
        self.sent = 0
        self.faults: list[str] = []
        self.page.on("pageerror", lambda error: self.faults.append(str(error)))
        self.page.on("websocket", lambda wire: wire.on("framesent", lambda data: self._count(data)))
        self.page.goto("about:blank")
        self.page.goto(server, wait_until="commit")
        self.page.wait_for_selector(".st-key-grid canvas.plot")
        self.told("runs 1 ")

    def _count(self, _data) -> None:
        self.sent += 1

    def told(self, words: str) -> None:
        self.page.wait_for_function(
            "words => document.querySelector('[data-testid=stText]')?.innerText.includes(words)", arg=words
        )

    def cell(self, row: int, column: int) -> tuple[float, float]:
        """The middle of a cell of the map: 34 page pixels a side, right of the longest query label."""
        box = self.page.locator(".st-key-map canvas.plot").bounding_box()
        left = box["width"] - 4 - 6 * 34
        return box["x"] + left + 34 * (column + 0.5), box["y"] + 46 + 34 * (row + 0.5)

    def colour(self, row: int, column: int) -> list[int]:
        """What is painted 5 pixels beside the middle of a cell, as red, green, blue, opacity."""
        x, y = self.cell(row, column)
        return self.page.evaluate(
            """([x, y]) => { const plot = document.elementFromPoint(x, y).shadowRoot.elementFromPoint(x, y),
            box = plot.getBoundingClientRect();
            return [...plot.getContext('2d').getImageData(x - box.left + 5, y - box.top, 1, 1).data] }""",
            [x, y],
        )

    def part(self, key: str, name: str):
        return self.page.locator(f".st-key-{key} .{name}")


@pytest.fixture
def opened(browser, server) -> Iterator[Opened]:
    opened = Opened(browser, server)
    yield opened
    assert opened.faults == []
    opened.page.close()


def test_a_pair_is_hovered_clicked_and_dragged(opened):
    page = opened.page
    before = opened.sent
    page.mouse.move(*opened.cell(4, 3))
    words = opened.part("map", "tip").inner_text().split("\n")
    assert words[:2] == ["query 4 the → key 3 $x$", "weight 0.700"]  # (4 * 6 + 3 + 1) / 40
    page.mouse.move(*opened.cell(1, 3))
    assert "masked" in opened.part("map", "tip").inner_text()
    page.mouse.move(*opened.cell(4, 3))
    assert opened.part("map", "keys").locator(".chip.lit").all_inner_texts() == ["$x$"]
    assert opened.sent == before  # hovering sends nothing

    page.mouse.click(*opened.cell(4, 3))
    opened.told("runs 2 events [{'cell': (4, 3)}]")  # one run of the script for one click
    page.mouse.move(*opened.cell(1, 0))
    page.mouse.down()
    page.mouse.move(*opened.cell(3, 2), steps=4)
    page.mouse.up()
    opened.told("{'window': (1, 4, 0, 3)}]")
    page.mouse.dblclick(*opened.cell(4, 3))
    opened.told("{'window': None}]")
    opened.part("map", "queries").locator(".chip").nth(5).click()
    opened.told("{'token': 5, 'side': 'query'}]")
    opened.part("map", "keys").locator(".chip").first.focus()
    for name in ("ArrowRight", "ArrowRight", "ArrowLeft", "Enter"):
        page.keyboard.press(name)
    opened.told("{'token': 1, 'side': 'key'}]")


def test_the_keyboard_walks_pairs_and_heads(opened):
    plot = opened.part("map", "plot")
    plot.focus()
    plot.press("ArrowDown")  # starts at the largest cell
    assert opened.part("map", "said").inner_text().startswith("query 0 <bos> → key 0 <bos>, weight 1.00")
    for name in ("ArrowDown", "ArrowDown", "ArrowRight", "Enter"):
        plot.press(name)
    opened.told("[{'cell': (2, 1)}]")
    plot.press("Shift+ArrowRight")
    opened.told("{'walk': (0, 1)}]")
    assert "Largest weights: 0 <bos> to 0 <bos> 1" in plot.get_attribute("aria-label")


def test_colours_are_chosen_in_the_browser_and_send_nothing(opened):
    faint = opened.colour(2, 1)  # (2 * 6 + 1 + 1) / 40 = 0.35
    assert faint[3] == 255
    before = opened.sent
    seen = {tuple(faint)}
    for scale in ("linear", "log"):
        opened.part("map", "scale").select_option(scale)
        seen.add(tuple(opened.colour(2, 1)))
    assert len(seen) == 3
    opened.part("map", "scale").select_option("linear")
    assert opened.part("map", "high").inner_text() == "1.00 weight, linear"
    assert opened.colour(5, 5) != opened.colour(5, 0)
    opened.part("map", "without").check()
    assert opened.part("map", "high").inner_text() == "0.900 weight, linear"
    assert opened.colour(5, 5) == opened.colour(5, 0)  # 0.9 is now the largest; position 0 holds 1.0
    opened.page.wait_for_timeout(500)
    assert opened.sent == before


def test_a_hostile_token_is_a_word(opened):
    chips = opened.part("map", "keys").locator(".chip").all_inner_texts()
    assert chips[:3] == ["<bos>", "<img src=x onerror='window.hit=1'>", "‹202E›evil"]
    assert opened.part("map", "title").inner_text() == "Head <b>0.0</b>"
    opened.page.mouse.move(*opened.cell(1, 1))
    assert "<img src=x" in opened.part("map", "tip").inner_text()
    assert opened.page.locator(".st-key-map img").count() == 0
    assert opened.page.evaluate("window.hit") is None


def test_heads_are_clicked_pinned_and_walked(opened):
    plot = opened.part("mosaic", "plot")
    plot.click(position={"x": 34 + 84 + 20, "y": 22 + 20})
    opened.told("[{'head': (0, 1)}]")
    plot.click(position={"x": 34 + 20, "y": 22 + 84 + 20}, modifiers=["Control"])
    opened.told("{'pin': (1, 0)}]")
    tiles = opened.part("grid", "plot")
    tiles.focus()
    for name in ("ArrowRight", "ArrowRight", "ArrowDown"):
        tiles.press(name)
    assert opened.part("grid", "said").inner_text() == "head 1.1, +0.250"
    tiles.press("Enter")
    opened.told("{'head': (1, 1)}]")


def test_a_place_that_is_shown_later_is_painted_then_also_where_one_drawing_overtook_another(browser):
    header = {
        "kind": "number",
        "title": "",
        "alt": "",
        "note": "",
        "unit": "",
        "low": 0,
        "high": 1,
        "signed": False,
    }
    header |= {"layers": [0], "heads": [0, 1], "chosen": None, "pins": []}
    page = browser.new_page()
    page.set_content(f"<div id=place style='display:none'>{text_of('head_tiles.html')}</div>")
    page.evaluate(
        """async ([code, bytes]) => {
            const url = URL.createObjectURL(new Blob([code], { type: 'text/javascript' })), module = await import(url);
            const parentElement = document.getElementById('place'), data = new Uint8Array(bytes);
            const undo = [0, 1].map(() => module.default({ data, parentElement, setTriggerValue: () => {} }));
            undo[0]?.();
            parentElement.style.display = 'block';
        }""",
        [text_of("base.js", "head_tiles.js"), list(packed(header, [np.array([1.0, 0.5], dtype="<f4")]))],
    )
    painted = "() => document.querySelector('.plot').getContext('2d').getImageData(50, 30, 1, 1).data[3] > 0"
    page.wait_for_function(painted, timeout=5000)
    page.close()


def test_a_dark_page_is_drawn_dark(browser, server):
    for scheme, most_is in (
        ("light", -1),
        ("dark", 1),
    ):  # where most is, paper gets darker and a screen brighter
        opened = Opened(browser, server, color_scheme=scheme)
        strong, weak = (sum(opened.colour(*at)[:3]) for at in ((5, 5), (1, 1)))  # 0.9 and 0.2
        assert (strong - weak) * most_is > 100
        ink = opened.part("map", "title").evaluate("node => getComputedStyle(node).color")
        light = sum(map(int, ink.removeprefix("rgb(").removesuffix(")").split(",")))
        assert (light - 382) * most_is > 100
        opened.page.close()
