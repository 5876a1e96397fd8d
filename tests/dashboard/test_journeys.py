"""In a real browser, the ways through the pages: from a head to why it looks there, and from an edit to its Python."""

from __future__ import annotations

import re
import subprocess
import sys
import urllib.parse

import pytest
import torch
from chromium import NEEDED
from visits import PROMPT, address, choose, heading, measured, settled

import headwater as hw

pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = NEEDED
LEFT, TOP = 34, 22  # of the first tile, in page pixels


def plot(page, key: str):
    """A canvas, once it is painted."""
    found = page.locator(f".st-key-{key} canvas.plot").first
    page.wait_for_function("canvas => canvas.clientHeight > 30", arg=found.element_handle())
    found.scroll_into_view_if_needed()
    return found


def alt(page, key: str) -> str:
    return plot(page, key).get_attribute("aria-label")


def figure(page, key: str):
    """A Plotly figure, once it is drawn."""
    found = page.locator(f"[class*='st-key-{key}'] .js-plotly-plot").first
    found.locator(".main-svg").first.wait_for()
    return found


def test_from_a_head_to_its_map_to_a_pair_to_why_it_looks_there(visit, small_model):
    page = visit("heads")
    tiles = plot(page, "heads_grid")
    wide = min(84, (tiles.bounding_box()["width"] - LEFT - 4) // 4)
    tiles.click(position={"x": LEFT + 2.5 * wide, "y": TOP + 1.5 * min(36, wide)})
    page.wait_for_function("() => new URL(location.href).searchParams.get('head') === '2'")
    settled(page)
    page.click(".st-key-open-head button")
    heading(page, "Head 1.2")
    assert {"layer": "1", "head": "2"}.items() <= address(page).items()

    canvas = plot(page, "map")
    for name in (
        "ArrowDown",
        *["ArrowDown"] * 5,
        "ArrowRight",
        "Enter",
    ):  # begins at the largest cell, of 0 and 0
        canvas.press(name)
    page.wait_for_function("() => new URL(location.href).searchParams.has('key')")
    query, key = (int(address(page)[name]) for name in ("query", "key"))
    assert (query, key) == (5, 1)

    words = ["<bos>", *PROMPT.split()]
    title = page.locator(".st-key-why .gtitle", has_text=f"{words[query]}” → “{words[key]}")
    said = float(str(title.text_content()).rpartition(" ")[2].replace("−", "-"))
    assert said == pytest.approx(score(small_model, 1, 2, query, key), rel=5e-3)


def score(folder: str, layer: int, head: int, query: int, key: int) -> float:
    """q · k / √d by a hook of one's own on transformers' GPT-2."""
    model = hw.load(folder)
    kept = {}
    hook = model.hf.transformer.h[layer].attn.c_attn.register_forward_hook(
        lambda module, given, out: kept.update(out=out.detach()[0].double())
    )
    with torch.no_grad():
        model(PROMPT)
    hook.remove()
    q, k, _ = (part.unflatten(-1, (4, 8))[:, head] for part in kept["out"].chunk(3, -1))
    return float(q[query] @ k[key]) / 8**0.5


@pytest.mark.slow
def test_from_an_edit_to_the_heads_that_changed_to_a_sweep_to_python_that_prints_the_same(visit, tmp_path):
    page = visit("edit")
    page.click(".st-key-add-edit button")
    page.wait_for_function("() => new URL(location.href).searchParams.has('edits')")
    moved = page.locator("[class*='st-key-edit-moved']").first
    moved.wait_for()
    figure(page, "edit-moved-0").locator(".draglayer .nsewdrag").first.click(position={"x": 20, "y": 20})
    page.wait_for_function("() => new URL(location.href).searchParams.has('edit.head')")
    settled(page)
    shown = address(page)["edit.head"].strip('"')
    assert alt(page, "edit-map-change").startswith(f"Head {shown}, B − A.")

    page.click(".st-key-bound-edit-sweep label")
    curve = figure(page, "edit-sweep-0")
    low, high = (
        float(n)
        for n in re.findall(
            r"([-+.\de]+) at", curve.evaluate("plot => plot.closest('[aria-label]')?.ariaLabel || ''")
        )
    )
    said = measured(page).replace("−", "-")
    page.click("summary:has-text('Python that repeats it')")
    code = page.locator("[data-testid=stCode] code", has_text="import headwater").inner_text()
    (tmp_path / "pasted.py").write_text(code, encoding="utf-8")
    ran = subprocess.run(
        [sys.executable, "pasted.py"], cwd=tmp_path, capture_output=True, text=True, timeout=200, check=True
    )
    printed = dict(re.findall(r"^([AB]): (\S+)$", ran.stdout, re.MULTILINE))
    assert f"A {float(printed['A']):.4g}" in said
    assert f"B {float(printed['B']):.4g}" in said
    assert high == pytest.approx(float(printed["A"]), rel=1e-3)  # all of it stays
    assert low != high


def test_the_parts_of_an_encoder_and_decoder_each_show_their_own_map(visit):
    source, written = "the cat sat on a mat", "w20 w21"
    page = visit("head?" + urllib.parse.urlencode({"model": "t5", "prompt": source, "decoder": written}))
    sizes = {}
    for part in ("decoder", "encoder", "cross"):
        if part != "decoder":
            choose(page, "bound-part", part)
            page.wait_for_function(
                "part => new URL(location.href).searchParams.get('part') === part", arg=part
            )
            settled(page)
        sizes[part] = re.findall(r"(\d+) queries, (\d+) keys", alt(page, "map"))[0]
        assert re.search(r"^A [-\d.]+ nats $", measured(page))
    queries, keys = len(written.split()) + 1, len(source.split())
    assert [tuple(map(int, sizes[part])) for part in ("encoder", "decoder", "cross")] == [
        (keys, keys), (queries, queries), (queries, keys)
    ]  # fmt: skip
