"""In a real browser: the journeys of a person through the pages; and nobody else is let in or asked.

Needs playwright and a Chromium (Debian: apt-get install chromium); without one the tests are skipped and say so.
"""

from __future__ import annotations

import json
import re
import socket
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

import pytest
import torch
from chromium import NEEDED
from visits import PROMPT, REDISTRIBUTE, WAIT, address, choose, heading, measured, settled, started

import headwater as hw

pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = NEEDED


def test_back_and_forward_walk_through_what_was_seen(visit):
    page = visit("head?layer=0&head=0")
    heading(page, "Head 0.0")
    for layer in (1, 2):
        choose(page, "bound-layer", str(layer))
        heading(page, f"Head {layer}.0")
    page.click(".st-key-menu a:has-text('Sinks')")
    heading(page, "Sinks")
    assert address(page)["layer"] == "2"  # a page carries the state along
    page.go_back()
    heading(page, "Head 2.0")
    page.go_back()
    heading(page, "Head 1.0")
    page.go_back()
    heading(page, "Head 0.0")
    page.go_forward()
    heading(page, "Head 1.0")


def test_a_pair_is_clicked_and_a_fresh_browser_sees_the_same(visit):
    page = visit("head?layer=1&head=2")
    canvas = page.locator(".st-key-map canvas").first
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    page.mouse.click(box["x"] + 0.3 * box["width"], box["y"] + 0.75 * box["height"])
    page.wait_for_function("() => new URL(location.href).searchParams.has('key')")
    settled(page)
    seen = address(page)
    other = visit(f"head?{urllib.parse.urlencode(seen)}")
    assert address(other) == seen
    assert measured(other) == measured(page)


def test_an_edit_its_numbers_and_its_python(visit, small_model):
    model = hw.load(small_model)
    known = torch.log_softmax(model(PROMPT)[0, -1].double(), -1)
    first, second = known.topk(2).indices.tolist()
    with model.edit(hw.Redistribute(keys=[0], keep=0.4)):
        after = torch.log_softmax(model(PROMPT)[0, -1].double(), -1)
    page = visit(f"edit?edits={urllib.parse.quote(json.dumps([REDISTRIBUTE]))}")
    said = measured(page)
    assert f"A {float(known[first] - known[second]):.4g}" in said
    assert f"B {float(after[first] - after[second]):.4g}" in said
    page.reload()
    settled(page)
    assert measured(page) == said


def test_two_visitors_have_edits_of_their_own(visit):
    one = visit(f"edit?edits={urllib.parse.quote(json.dumps([REDISTRIBUTE]))}")
    other = visit("edit")
    assert "B" in measured(one)
    assert "B" not in measured(other).replace("Run B", "")
    assert "edits" not in address(other)


def test_edits_too_long_for_an_address_survive_a_reload(visit):
    heads = [f"{layer}.{head}" for layer in range(3) for head in range(4)]
    many = [REDISTRIBUTE | {"heads": heads, "keep": share / 20} for share in range(1, 14)]
    page = visit(f"edit?edits={urllib.parse.quote(json.dumps(many))}")
    page.click(".st-key-menu a:has-text('Sinks')")
    heading(page, "Sinks")
    assert list(address(page)) == ["view"]
    said = measured(page)
    page.reload()
    settled(page)
    assert measured(page) == said
    assert "13 changes" in page.inner_text(".st-key-frame")


@pytest.mark.parametrize(
    "path", ["", "heads", "head", "flow", "sinks", "circuits", "edit", "compare", "experiments"]
)
def test_every_page_fits_a_phone_in_the_dark(visit, path):
    page = visit(path, viewport={"width": 390, "height": 844}, color_scheme="dark")
    wide = page.evaluate("document.querySelector('[data-testid=stMain]').scrollWidth")
    assert wide <= 390
    red, green, blue = page.evaluate(
        "getComputedStyle(document.querySelector('[data-testid=stApp]')).backgroundColor.match(/\\d+/g).map(Number)"
    )[:3]
    assert max(red, green, blue) < 80


@pytest.mark.parametrize("model", ["vit-digits", "vlm-digits"])
def test_a_model_that_sees_shows_its_map_and_its_picture(visit, model):
    page = visit(f"head?model={model}")
    page.wait_for_selector(".st-key-map canvas")
    page.wait_for_selector(".st-key-on-picture .js-plotly-plot")
    assert re.search(r"A [\d.]+ nats", measured(page))


def test_a_server_that_starts_again_finds_the_open_page_and_its_long_edits(browser, small_model, tmp_path):
    heads = [f"{layer}.{head}" for layer in range(3) for head in range(4)]
    many = [REDISTRIBUTE | {"heads": heads, "keep": share / 20} for share in range(1, 14)]
    with started(small_model, 8690, tmp_path) as address:
        port = int(address.rsplit(":", 1)[1])
        page = browser.new_context().new_page()
        page.set_default_timeout(WAIT)
        page.goto(f"{address}/sinks?edits={urllib.parse.quote(json.dumps(many))}", wait_until="commit")
        settled(page)
        page.click(".st-key-menu a:has-text('Edit')")
        heading(page, "Edit")
        said = measured(page)
    with started(small_model, port, tmp_path):
        page.reload(wait_until="commit")
        settled(page)
        assert measured(page) == said
        page.context.close()


def test_hostile_tokens_are_inert(visit):
    hostile = "<img src=x onerror=window.hit=1> **b** $x$ <s>"
    page = visit(f"head?prompt={urllib.parse.quote(hostile)}")
    assert page.evaluate("window.hit") is None
    assert page.locator("img[src=x]").count() == 0


def test_a_foreign_host_is_refused(server):
    request = urllib.request.Request(server, headers={"Host": "evil.example"})
    with pytest.raises(urllib.error.HTTPError, match="400") as caught:
        urllib.request.urlopen(request, timeout=20)
    caught.value.close()


@pytest.mark.parametrize(
    ("host", "origin", "answer"),
    [
        ("evil.example", "http://evil.example", "4"),
        ("{own}", "http://evil.example", "403"),
        ("{own}", "http://{own}", "101"),
    ],
)
def test_only_the_own_pages_reach_the_socket(server, host, origin, answer):
    own = server.removeprefix("http://")
    with socket.create_connection((own.split(":")[0], int(own.split(":")[1])), timeout=20) as raw:
        raw.sendall(
            f"GET /_stcore/stream HTTP/1.1\r\nHost: {host.format(own=own)}\r\nOrigin: {origin.format(own=own)}\r\n"
            "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
            "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n".encode()
        )
        assert raw.recv(64).decode().split()[1].startswith(answer)


def test_only_loopback_is_listened_on(server):
    port = int(server.rsplit(":", 1)[1])
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    listening = {line[1] for line in lines if line[3] == "0A"}
    assert f"0100007F:{port:04X}" in listening
    assert f"00000000:{port:04X}" not in listening
