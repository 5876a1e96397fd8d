"""In a real browser, a text of 8,192 tokens: few bytes per interaction, and a run that is cancelled stops."""

from __future__ import annotations

import base64
import random
import re
import time

import psutil
import pytest
import torch
from chromium import NEEDED
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from visits import heading, settled, started

pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = [*NEEDED, pytest.mark.slow]
LENGTH, MOST = 8192, 500_000
WORDS = ["when", "mary", "and", "john", "went", "to", "the", "store", "gave", "drink"]
TEXT = " ".join(random.Random(0).choices(WORDS, k=LENGTH))


@pytest.fixture(scope="module")
def long_model(tmp_path_factory) -> str:
    """Folder of a random Llama of 4 layers with 2 heads and a context of 8,192."""
    folder = str(tmp_path_factory.mktemp("models") / "long")
    words = Tokenizer(models.WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token=WORDS[0]))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token=WORDS[0]).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=LENGTH, initializer_range=0.3, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def server(long_model, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        # the loops of the extra take seconds to compile, in which nothing hears that a run was cancelled
        patch.setenv("NUMBA_DISABLE_JIT", "1")
        yield from _served(long_model, tmp_path_factory)


def _served(long_model, tmp_path_factory):
    with started(long_model, 8712, tmp_path_factory.mktemp("workspace"), prompt=TEXT) as address:
        yield address


@pytest.fixture
def page(visit):
    """The page Head, just asked for; faults are noted from the first page on."""
    page = visit("experiments")  # needs no run
    page.locator(".st-key-menu a").filter(has_text=re.compile("Head$")).first.click()
    return page


def used(port: str) -> float:
    """CPU seconds of the server."""
    (process,) = [
        each for each in psutil.process_iter(["cmdline"])
        if "headwater.dashboard" in (each.info["cmdline"] or []) and port in each.info["cmdline"]
    ]  # fmt: skip
    return sum(process.cpu_times()[:2])


def test_a_run_that_is_cancelled_stops_and_can_begin_again(page, server):
    page.wait_for_selector("[data-testid=stProgress]:has-text('Run A: ')")
    assert page.input_value(".st-key-bound-text textarea") == TEXT  # what needs no run is there
    page.click("[class*='st-key-cancel-'] button")
    page.get_by_text("Run A: cancelled.").wait_for()
    time.sleep(2.0)  # a layer may still end
    before = used(server.rsplit(":", 1)[1])
    time.sleep(1.5)
    assert used(server.rsplit(":", 1)[1]) - before < 0.3
    page.click("button:has-text('Compute')")
    heading(page, "Head 0.0")


def test_each_interaction_sends_less_than_half_a_megabyte(page):
    got = 0
    wire = page.context.new_cdp_session(page)
    wire.send("Network.enable")

    def framed(event):
        nonlocal got
        told = event["response"]
        got += len(base64.b64decode(told["payloadData"]) if told["opcode"] == 2 else told["payloadData"])

    wire.on("Network.webSocketFrameReceived", framed)
    sent = {}

    def do(name, act):
        nonlocal got
        got = 0
        act()
        page.wait_for_timeout(300)
        settled(page)
        page.wait_for_timeout(1500)
        sent[name] = got

    heading(page, "Head 0.0")
    canvas = page.locator("canvas.plot[aria-roledescription='attention map']").first
    canvas.scroll_into_view_if_needed()
    settled(page)
    do("another head", lambda: canvas.press("Shift+ArrowRight"))
    heading(page, "Head 0.1")
    box = canvas.bounding_box()
    do("a pair", lambda: canvas.click(position={"x": 0.3 * box["width"], "y": 0.8 * box["height"]}))
    page.wait_for_function("() => new URL(location.href).searchParams.has('key')")
    do("the colour scale", lambda: page.locator("select.scale").first.select_option("log"))
    for name in ("Flow", "Sinks", "Edit"):
        link = page.locator(".st-key-menu a").filter(has_text=re.compile(f"{name}$")).first
        do(name, lambda link=link, name=name: (link.click(), heading(page, name)))
    do("an edit", lambda: (page.click(".st-key-add-edit button"), page.wait_for_selector("text=→ B")))
    assert sent.pop("the colour scale") < 50_000  # what a job tells of itself, and nothing of the map
    assert {name: size for name, size in sent.items() if not 1_000 < size < MOST} == {}
