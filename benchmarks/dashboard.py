"""Seconds, CPU seconds and bytes of what a user does in the dashboard, counted in Chromium.

`python benchmarks/dashboard.py` (results go to benchmarks/results/dashboard.json) takes about six minutes on two cores.
The server is started as a user starts it, for each subject anew: the embedded `tasks-4l` and, where it was added,
`smollm2-135m` on the prompt that they begin with, and a small random Llama whose prompt is 8,192 tokens long, since the
context of `tasks-4l` is 256. `--subjects "smollm2-135m at 8192"` is that model on as long a prompt, whose runs take
minutes. Playwright drives a headless Chromium. Of each interaction it counts

- wall: from the click until the script has ended and nothing more comes; a run of the model is waited for, and other
  jobs that run on are cancelled after some seconds (`--jobs`), as a user would who has seen enough;
- acted: until what was clicked is there, such as the heading of a page that is opened;
- of a second visitor, whose browser computes on the same cores here: told, until the server has begun to tell the page;
  shown, until it is blank no more (the frame in which its heading or its bar above the page is painted, as the page
  itself times it, since a question from outside waits until the browser has nothing else to do); menu, likewise;
- drawn: until the script has ended for the first time;
- CPU seconds of the server's process and of all processes of the browser;
- bytes to the browser, over the WebSocket and over HTTP;
- full garbage collections in the server, and their CPU seconds.

CPU seconds and bytes say more than wall time on a machine that others use. An interaction that a page does not offer is
said to be so, with the reason. The last lines say which targets are met.
"""

from __future__ import annotations

import argparse
import base64
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch
from cpu_report import head, write
from playwright.sync_api import Error, Page, sync_playwright
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from headwater.lens.errors import first_line
from headwater.lens.trained.registry import is_added

RESULTS = Path(__file__).parent / "results" / "dashboard.json"
TRAINED, LONG, LONG_TRAINED = "smollm2-135m", "8192 tokens", "smollm2-135m at 8192"
SUBJECTS = ("tasks-4l", TRAINED, LONG)
LENGTH = 8192
WORDS = ["when", "mary", "and", "john", "went", "to", "the", "store", ",", "gave", "a", "drink"]
COMMON = [
    "when",
    "and",
    "went",
    "to",
    "the",
    "store",
    "gave",
    "a",
    "drink",
]  # one token each in any vocabulary
VISITS = 5  # of a second visitor
QUIET = 0.5  # seconds without a byte or a running script after which an interaction is over
PATIENCE = 60_000  # ms until an element must be there
MOST = 900  # s until an interaction must be over
JOBS = 8.0  # s until jobs other than runs are cancelled
WORK = "[class*='st-key-job-']"
RUN = re.compile("Run [AB]")
GRID = "canvas.plot[aria-roledescription='heads by layer']"
MAP = "canvas.plot[aria-roledescription='attention map']"
# milliseconds from the moment that the browser was asked for the page until the frame that paints what is waited for
PAINTED = """
window.painted = {};
const wanted = {shown: "[data-testid=stHeading], .st-key-frame", menu: ".st-key-menu a"};
new MutationObserver(() => {
  for (const [name, where] of Object.entries(wanted)) {
    if (!(name in window.painted) && document.querySelector(where)) {
      window.painted[name] = 0;
      requestAnimationFrame(() => { window.painted[name] = performance.now(); });
    }
  }
}).observe(document, {childList: true, subtree: true});
"""
# the command, with a note of each full garbage collection
SERVER = """
import gc, sys, time
log, begun = open(sys.argv.pop(1), "a", buffering=1), 0.0
def note(phase, told):
    global begun
    if told["generation"] == 2 and phase == "start":
        begun = time.thread_time()
    elif told["generation"] == 2:
        log.write(f"{time.thread_time() - begun:.4f}\\n")
gc.callbacks.append(note)
from headwater.command.cli import main
main()
"""


@dataclass
class Bench:
    """One server and one page of one browser, and what came over the wire."""

    url: str
    server: psutil.Process
    collections: Path
    page: Page
    jobs: float = JOBS
    socket: int = 0
    http: int = 0
    last: float = 0.0
    cancelled: int = 0
    measured: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    not_run: dict[str, str] = field(default_factory=dict)
    noted: dict[str, float] = field(default_factory=dict)  # by the interaction that is measured

    def listen(self) -> None:
        wire = self.page.context.new_cdp_session(self.page)
        wire.send("Network.enable")

        def framed(event: dict[str, Any]) -> None:
            told = event["response"]
            body = told["payloadData"]
            self.socket += len(base64.b64decode(body)) if told["opcode"] == 2 else len(body)
            self.last = time.perf_counter()

        def received(event: dict[str, Any]) -> None:
            self.last = time.perf_counter()

        def finished(event: dict[str, Any]) -> None:
            self.http += int(event["encodedDataLength"])  # of the whole answer, as it came over the wire
            self.last = time.perf_counter()

        wire.on("Network.webSocketFrameReceived", framed)
        wire.on("Network.dataReceived", received)
        wire.on("Network.loadingFinished", finished)

    def do(self, name: str, act: Callable[[], object]) -> None:
        """Measure one interaction, and all that follows it."""
        before = self._counts()
        start = self.last = time.perf_counter()
        try:
            act()
            acted = time.perf_counter()
            drawn = self._settled()
        except Error as error:
            self.not_run.setdefault(name, first_line(error)[:160])
            return
        after = self._counts()
        told = {key: after[key] - before[key] for key in after}
        told |= {
            "wall_s": max(self.last, drawn) - start,
            "acted_s": acted - start,
            "drawn_s": drawn - start,
            **self.noted,
        }
        self.noted.clear()
        self.measured.setdefault(name, []).append(told)
        print(f"  {name}: " + ", ".join(f"{key} {value:.3f}" for key, value in told.items()), flush=True)

    def _settled(self) -> float:
        """When the script had ended for the first time; returns once all is quiet."""
        start, drawn, begun = time.perf_counter(), 0.0, 0.0
        while True:
            self.page.wait_for_timeout(50)
            now = time.perf_counter()
            state = "() => document.querySelector('[data-testid=stApp]')?.dataset.testScriptState"
            if self.page.evaluate(state) != "notRunning":
                self.last = now
            elif count := (work := self.page.locator(WORK)).count():
                drawn, self.last = drawn or now, now
                others = work.filter(has_not_text=RUN)
                begun = now if others.count() < count else begun or now  # runs are waited for first
                if begun and now - begun > self.jobs:
                    with suppress(Error):  # it may have ended meanwhile
                        others.first.locator("button").first.click(timeout=5000)
                        self.cancelled += 1
            elif now - self.last > QUIET:
                return drawn or self.last
            if now - start > MOST:
                raise Error(f"not over after {MOST} s")

    def _counts(self) -> dict[str, float]:
        collected = [float(line) for line in self.collections.read_text().split()]
        browser = [each for each in psutil.Process().children(recursive=True) if "chrom" in _name(each)]
        return {
            "server_cpu_s": _cpu(self.server),
            "browser_cpu_s": sum(map(_cpu, browser)),
            "socket_bytes": self.socket,
            "http_bytes": self.http,
            "cancelled_jobs": self.cancelled,
            "full_collections": len(collected),
            "collecting_cpu_s": sum(collected),
        }

    # what a user does

    def first_view(self) -> None:
        def act() -> None:
            self.page.goto(self.url)
            self.page.wait_for_selector("[data-testid=stHeading]")

        self.do("first view", act)

    def to(self, name: str) -> None:
        link = self.page.locator(".st-key-menu a").filter(has_text=re.compile(f"{name}$")).first

        def act() -> None:
            link.click()
            self.page.wait_for_selector(f"[data-testid=stHeading] :text-matches('^{name}')")

        self.do(f"page change to {name}", act)

    def click(self, name: str, canvas: str, across: float, down: float) -> None:
        """Click a canvas at a share of its width and height."""

        def act() -> None:
            plot = self.page.locator(canvas).first
            box = plot.bounding_box(timeout=PATIENCE)
            assert box is not None
            plot.click(position={"x": box["width"] * across, "y": box["height"] * down})

        self.do(name, act)

    def zoom(self) -> None:
        def act() -> None:
            plot = self.page.locator(MAP).first
            plot.scroll_into_view_if_needed()
            box = plot.bounding_box()
            assert box is not None
            x, y = box["x"] + 0.5 * box["width"], box["y"] + 0.65 * box["height"]
            self.page.mouse.move(x, y)
            self.page.mouse.down()
            self.page.mouse.move(x + 20, y + 20, steps=4)
            self.page.mouse.up()

        self.do("zoom into the map", act)

    def second_visitor(self) -> None:
        """Somebody else opens a page on a short prompt, just after an edit was added."""
        other = self.page.context.new_page()
        other.add_init_script(PAINTED)
        frames: list[float] = []
        other.on(
            "websocket", lambda wire: wire.on("framereceived", lambda _: frames.append(time.perf_counter()))
        )

        def act() -> None:
            begun = time.perf_counter()
            other.goto(f"{self.url}/head?prompt=when+mary+and+john", wait_until="commit")
            other.wait_for_selector("[data-testid=stHeading]")
            other.wait_for_function("window.painted.menu && window.painted.shown")
            found = other.evaluate("window.painted")
            self.noted |= {
                "told_s": frames[0] - begun,
                "shown_s": found["shown"] / 1000,
                "menu_s": found["menu"] / 1000,
            }

        self.page.locator(".st-key-add-edit button").first.click()
        self.do("second visitor while run B is made", act)
        other.close()

    def journey(self, repeats: int, long: bool) -> None:
        page = self.page
        self.first_view()
        self.to("Heads")
        for n in range(repeats):
            self.click("head click", GRID, 0.45 + 0.12 * n, 0.4 + 0.15 * n)
        self.to("Head")
        for n in range(repeats):
            self.do("other head", lambda: page.locator(MAP).first.press("Shift+ArrowRight"))
            self.click("pair click", MAP, 0.4 + 0.05 * n, 0.8)
            scale = ("log", "linear", "sqrt")[n % 3]
            self.do(
                "colour scale", lambda scale=scale: page.locator("select.scale").first.select_option(scale)
            )
        self.zoom()
        if not long:
            self.do("token click", lambda: page.locator(".strip.queries .chip").first.click())
        for name in ("Flow", "Sinks", "Edit"):
            self.to(name)
        self.do("edit added", lambda: page.locator(".st-key-add-edit button").first.click())
        for _ in range(VISITS if long else 0):
            self.second_visitor()


def _name(process: psutil.Process) -> str:
    try:
        return process.name()
    except psutil.Error:
        return ""


def _cpu(process: psutil.Process) -> float:
    try:
        used = process.cpu_times()
    except psutil.Error:  # it has ended
        return 0.0
    return used.user + used.system


def long_model(folder: Path) -> tuple[str, str]:
    """A random Llama of 4 layers and 4 heads, and a prompt of 8,192 tokens for it."""
    words = Tokenizer(models.WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token=WORDS[0]))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token=WORDS[0]).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=LENGTH, initializer_range=0.3, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    drawn = torch.randint(0, len(WORDS), (LENGTH,)).tolist()
    return str(folder), " ".join(WORDS[n] for n in drawn)


@contextmanager
def served(subject: str, folder: Path) -> Iterator[tuple[str, psutil.Process, Path]]:
    """Address and process of a dashboard on the subject, and the file that tells its garbage collections."""
    log = folder / "collections"
    log.touch()
    model, more = subject, []
    if subject == LONG:
        model, prompt = long_model(folder / "long")
        more = ["--prompt", prompt]
    if subject == LONG_TRAINED:
        model, more = TRAINED, ["--prompt", " ".join(COMMON[n % len(COMMON)] for n in range(LENGTH - 2))]
    command = [sys.executable, "-c", SERVER, str(log), "dashboard", model, "--port", "8760", *more]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        lines = iter(process.stdout.readline, "")
        yield (
            next(line.split()[4] for line in lines if line.startswith("Headwater is open at")),
            psutil.Process(process.pid), log,
        )  # fmt: skip
    finally:
        process.terminate()
        process.wait(60)
        process.stdout.close()


def run(subject: str, repeats: int, jobs: float) -> dict[str, Any]:
    print(subject, flush=True)
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium") or shutil.which("google-chrome"),
            args=["--no-sandbox", "--disable-dev-shm-usage"],
        )
        with served(subject, Path(folder)) as (url, server, log):
            page = browser.new_context(viewport={"width": 1280, "height": 900}).new_page()
            page.set_default_timeout(PATIENCE)
            bench = Bench(url, server, log, page, jobs)
            bench.listen()
            bench.journey(repeats, subject in (LONG, LONG_TRAINED))
            memory = server.memory_info().rss
        browser.close()
    found = {name: summary(runs) for name, runs in bench.measured.items()}
    missing = {name: {"not_run": why} for name, why in bench.not_run.items() if name not in found}
    return {"server_rss_mb": memory / 1e6, "interactions": found | missing}


def summary(runs: list[dict[str, float]]) -> dict[str, Any]:
    """Medians, with the spread of the wall time and the longest that a visitor waited."""
    walls = [run["wall_s"] for run in runs]
    middle = {key: round(statistics.median(run[key] for run in runs), 4) for key in runs[0]}
    if "shown_s" in middle:
        middle["shown_most_s"] = round(max(run["shown_s"] for run in runs), 4)
    return middle | {"wall_spread_s": [round(min(walls), 4), round(max(walls), 4)], "repeats": len(runs)}


ACTS = (
    "head click", "other head", "pair click", "zoom into the map", "page change to Flow", "page change to Sinks",
    "page change to Edit", "edit added",
)  # fmt: skip
TARGETS = [  # subject, interaction, number, most
    ("tasks-4l", "first view", "drawn_s", 3.0),
    (TRAINED, "first view", "drawn_s", 6.0),
    ("tasks-4l", "head click", "server_cpu_s", 0.5),
    (TRAINED, "head click", "server_cpu_s", 0.5),
    *((name, "colour scale", "socket_bytes", 0) for name in (*SUBJECTS, LONG_TRAINED)),
    *((name, act, "socket_bytes", 500_000) for name in (LONG, LONG_TRAINED) for act in ACTS),
    *((name, "head click", "collecting_cpu_s", 0.05) for name in (*SUBJECTS, LONG_TRAINED)),
    *((name, "second visitor while run B is made", "shown_most_s", 2.0) for name in (LONG, LONG_TRAINED)),
]


def targets(subjects: dict[str, Any]) -> list[dict[str, Any]]:
    """What was aimed at and what was found; None where it was not measured."""
    rows = []
    for subject, name, number, most in TARGETS:
        if subject in subjects:
            found = subjects[subject]["interactions"].get(name, {}).get(number)
            met = None if found is None else found <= most
            rows.append(
                {
                    "subject": subject,
                    "interaction": name,
                    "number": number,
                    "found": found,
                    "at_most": most,
                    "met": met,
                }
            )
    return rows


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--subjects", nargs="+", default=SUBJECTS, choices=(*SUBJECTS, LONG_TRAINED))
    options.add_argument("--repeats", type=int, default=2)
    options.add_argument("--jobs", type=float, default=JOBS, help="seconds until a job is cancelled")
    options.add_argument("--out", type=Path, default=RESULTS)
    chosen = options.parse_args()
    report = head("the dashboard in Chromium", torch.get_num_threads())
    report["versions"] |= {name: version(name) for name in ("streamlit", "plotly", "playwright")}
    report["subjects"] = {}
    for subject in chosen.subjects:
        if subject in (TRAINED, LONG_TRAINED) and not is_added(TRAINED):
            report["subjects"][subject] = {"not_run": "not added", "interactions": {}}
            continue
        report["subjects"][subject] = run(subject, chosen.repeats, chosen.jobs)
    report["targets"] = targets(report["subjects"])
    for row in report["targets"]:
        said = {True: "met", False: "NOT MET", None: "not measured"}[row["met"]]
        print("{subject}, {interaction}, {number} {found} of {at_most}: {said}".format(said=said, **row))
    write(report, chosen.out)


if __name__ == "__main__":
    main()
