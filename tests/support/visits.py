"""A dashboard in a process of its own, and what a person does at its pages."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PROMPT = "When Mary and John went to the store , John gave a drink to"
REDISTRIBUTE = {
    "edit": "Redistribute",
    "keys": [0],
    "keep": 0.4,
    "to": "others",
    "heads": "all",
    "layers": "all",
}
WAIT = 90_000
SERVE = """
import sys
from headwater.dashboard.launch import run
from headwater.dashboard.running import models
for more in sys.argv[4:]:
    models.allow(more)
run(sys.argv[1], int(sys.argv[2]), prompt=sys.argv[3])
"""


@contextmanager
def started(model: str, port: int, workspace: Path, *more: str, prompt: str = PROMPT) -> Iterator[str]:
    """Address of a dashboard started as a user starts it; it offers `more` models too, where these are given."""
    begin = ["-c", SERVE, model, str(port), prompt, *more] if more else [
        "-m", "headwater.dashboard", model, "--port", str(port), "--prompt", prompt
    ]  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, *begin],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "HEADWATER_WORKSPACE": str(workspace)},
        cwd=Path(__file__).parents[2],
    )
    assert process.stdout is not None
    try:
        lines = iter(process.stdout.readline, "")
        yield next(line.split()[4] for line in lines if line.startswith("Headwater is open at"))
    finally:
        process.terminate()
        process.wait(120)
        process.stdout.close()


class Visitors:
    """Opens pages of visitors of their own; notes what they throw, and what they ask of another machine."""

    def __init__(self, browser, server: str) -> None:
        self.browser, self.server = browser, server
        self.faults: list[str] = []
        self.opened = []

    def __call__(self, path: str = "", **more):
        context = self.browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **more})
        self.opened.append(context)
        page = context.new_page()
        page.set_default_timeout(WAIT)
        page.on("pageerror", lambda error: self.faults.append(f"error: {error}"))
        page.on("console", self._hear)
        page.on("request", lambda request: self._note(request.url))
        page.goto(f"{self.server}/{path}", wait_until="commit")
        settled(page)
        return page

    def _hear(self, said) -> None:
        # Streamlit looks for its own address at the page's first, and goes on one level up
        looked = re.fullmatch(
            rf"{self.server}/[a-z]+/_stcore/(health|host-config)", said.location.get("url", "")
        )
        if said.type == "error" and not looked:
            self.faults.append(f"console: {said.text} {said.location.get('url', '')}")

    def _note(self, url: str) -> None:
        if not url.startswith((self.server, "data:", "blob:")):
            self.faults.append(f"request: {url}")

    def close(self) -> None:
        for context in self.opened:
            context.close()


def settled(page) -> None:
    """Wait until the page is drawn and nothing runs."""
    page.wait_for_selector("h1, h2")
    page.wait_for_selector("[data-testid=stApp][data-test-script-state=notRunning]")


def address(page) -> dict[str, str]:
    return dict(urllib.parse.parse_qsl(urllib.parse.urlparse(page.url).query))


def heading(page, text: str) -> None:
    page.wait_for_selector(f"h2:has-text('{text}')")


def choose(page, key: str, value: str) -> None:
    """Take an option of a selectbox; once more where the page was drawn anew under the click."""
    for _ in range(4):
        page.click(f".st-key-{key} button[aria-haspopup=listbox]")
        page.click(f"[role=option]:has-text('{value}')")
        settled(page)
        page.wait_for_timeout(500)
        if page.input_value(f".st-key-{key} input") == value:
            return


def measured(page) -> str:
    """What the bar says of runs A and B."""
    said = page.locator(".st-key-frame [data-testid=stMarkdownContainer]")
    return said.filter(has_text=re.compile(r"^A [-\d]")).last.inner_text()
