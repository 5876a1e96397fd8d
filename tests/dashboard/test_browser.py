"""In a real browser: open, click a head, redistribute a sink, compare; and nobody else is let in or asked.

Needs playwright and a Chromium (Debian: apt-get install chromium); without one the tests are skipped and say so.
"""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import headwater as hw

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PROMPT = "When Mary and John went to the store , John gave a drink to"
WAIT = 60_000

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine: apt-get install chromium"),
]


@pytest.fixture(scope="module")
def server(small_model) -> Iterator[str]:
    """Address of a dashboard started as a user starts it."""
    command = [sys.executable, "-m", "headwater", "dashboard", small_model, "--port", "8650"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        lines = iter(process.stdout.readline, "")
        yield next(line.split()[4] for line in lines if line.startswith("Headwater is open at"))
    finally:
        process.terminate()
        process.wait(120)
        process.stdout.close()


@pytest.fixture(scope="module")
def browser() -> Iterator:
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"]
        )
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser, server) -> Iterator:
    """A page that fails the test if it throws, or asks anything of another machine."""
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.set_default_timeout(WAIT)
    faults: list[str] = []
    page.on("pageerror", lambda error: faults.append(f"error: {error}"))
    page.on("request", lambda request: _note_foreign(request.url, server, faults))
    yield page
    page.close()
    assert faults == []


def _note_foreign(url: str, server: str, faults: list[str]) -> None:
    if not url.startswith((server, "data:", "blob:")):
        faults.append(f"request: {url}")


def click_point(page, key: str, x: float, y: float) -> None:
    """Click a data point of a figure, wherever the layout put it. The figure's key ends in a count of clicks."""
    plot = f"[class*='st-key-{key}-'] .js-plotly-plot"
    page.wait_for_selector(f"{plot} .nsewdrag", state="attached")
    at = page.evaluate(
        """([plot, x, y]) => { const graph = document.querySelector(plot), layout = graph._fullLayout,
        area = graph.querySelector('.nsewdrag').getBoundingClientRect();
        return [area.left + layout.xaxis.d2p(x), area.top + layout.yaxis.d2p(y)] }""",
        [plot, x, y],
    )
    page.mouse.move(*at)
    page.wait_for_selector(".hoverlayer .hovertext", state="attached")
    page.mouse.click(*at)


def metrics(page) -> list[str]:
    return page.locator("[data-testid=stMetricValue]").all_inner_texts()


def test_click_a_head_redistribute_a_sink_and_compare(page, server, small_model):
    page.goto(server)
    click_point(page, "heads", 3, 2)
    page.wait_for_selector("h2:has-text('Head 2.3')")
    assert page.url.startswith(f"{server}/head?")
    assert "layer=2&head=3" in page.url

    page.click("[data-testid=stSidebarNav] a:has-text('Edit')")
    page.click(".st-key-add-edit button")
    page.wait_for_selector(".st-key-next-both .bartext", state="attached")
    model = hw.load(small_model)
    with model.edit(hw.Redistribute(keys=[0], keep=0.4)):
        loss, logits = float(model.loss(PROMPT)[0]), model(PROMPT)[0, -1]
    before = model(PROMPT)[0, -1]
    likeliest = int(before.argmax())
    probability = float(torch.softmax(logits.double(), -1)[likeliest])
    assert metrics(page) == [f"{float(model.loss(PROMPT)[0]):.4f}", f"{loss:.4f}", f"{probability:.4f}"]
    bars = page.locator(".st-key-next-both .bartext").all_text_contents()
    assert f"{probability:.3f}" in bars
    assert f"{float(torch.softmax(before.double(), -1)[likeliest]):.3f}" in bars

    edited = metrics(page)
    page.reload()  # the address holds page, head, prompt and edits
    page.wait_for_selector(".st-key-next-both .bartext", state="attached")
    assert metrics(page) == edited
    assert page.locator(".st-key-map-after .js-plotly-plot").count() == 1
    assert "edits=" in page.url


def test_a_click_on_a_token_shows_its_flow(page, server):
    page.goto(f"{server}/flow")
    click_point(page, "flow", 4, 0)
    page.wait_for_selector(".st-key-flow-bars .gtitle:has-text('token 4')", state="attached")


def test_numbers_are_downloaded_as_csv_and_json(page, server, small_model):
    page.goto(f"{server}/flow")
    page.click("[data-testid=stExpander] summary")
    shares = hw.analyses.rollout(hw.load(small_model).record(PROMPT), queries=[-1]).values[0, 0]
    with page.expect_download() as caught:
        page.click(".st-key-flow-numbers-csv button")
    lines = Path(caught.value.path()).read_text().splitlines()
    assert lines[0] == '"position","token","share"'
    assert [float(line.split(",")[-1]) for line in lines[1:]] == pytest.approx(list(shares), abs=1e-6)
    with page.expect_download() as caught:
        page.click(".st-key-flow-numbers-json button")
    assert json.loads(Path(caught.value.path()).read_text())[1]["token"] == "When"


def test_hostile_tokens_are_shown_letter_by_letter(page, server):
    page.goto(f"{server}/head?prompt=%3Cs%3E+%3C%2Fs%3E+%26lt%3B+%24x%24+**b**+When+When")
    page.wait_for_selector(".st-key-pattern .y3tick text", state="attached")
    labels = page.locator(".st-key-pattern .y3tick text").all_text_contents()
    assert labels == ["0 <bos>", "1 <s>", "2 </s>", "3 &lt;", "4 $x$", "5 **b**", "6 When", "7 When"]


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
