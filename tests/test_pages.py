"""The programs of the tutorial, the how-tos and other pages run in their order, and print what stands below.

A fence says what is not run, and why: ```python skip="needs a GPU". A fence with file="NAME" is written to that
file, one with real="NAME" runs where that trained model has been added.

Seen to fail with a number changed on a page, a name that the program does not know, and a fence without a reason.
"""

from __future__ import annotations

import contextlib
import functools
import io
import re
from dataclasses import dataclass
from pathlib import Path

import pytest

import headwater as hw
from headwater.lens.trained.registry import is_added

DOCS = Path(__file__).parents[1] / "docs"
PAGES = sorted(
    path.relative_to(DOCS).as_posix()
    for pattern in (
        "tutorial/*.md",
        "howto/*.md",
        "reference/*.md",
        "experiments.md",
        "analyses.md",
        "figures.md",
        "scale.md",
    )
    for path in DOCS.glob(pattern)
)
FENCE = re.compile(
    r"^```(\w+)([^\n]*)\n(.*?)^```$(?:\n\nprints\n\n```text\n(.*?)^```$)?", re.MULTILINE | re.DOTALL
)
NUMBER = re.compile(r"-?\d+\.\d+")

load, opened = hw.load, functools.cache(hw.load)


@dataclass(frozen=True)
class Fence:
    language: str
    options: str
    text: str
    printed: str | None


def fences(page: str) -> list[Fence]:
    found = FENCE.findall((DOCS / page).read_text(encoding="utf-8"))
    return [Fence(*each[:3], each[3] or None) for each in found]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks transformers
@pytest.mark.parametrize("page", PAGES)
def test_the_programs_of_a_page_print_what_it_says(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hw, "load", _load)
    known: dict[str, object] = {"hw": hw}
    for fence in fences(page):
        if name := re.search(r'file="([\w.]+)"', fence.options):
            Path(name[1]).write_text(fence.text, encoding="utf-8")
        if fence.language != "python" or "skip" in fence.options:
            continue
        if (needed := re.search(r'real="([\w-]+)"', fence.options)) and not is_added(needed[1]):
            continue
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(compile(fence.text, page, "exec"), known)
        if fence.printed is not None:
            assert NUMBER.sub("#", out.getvalue()) == NUMBER.sub("#", fence.printed)
            told = [float(text) for text in NUMBER.findall(fence.printed)]
            # two digits are printed, and another processor may round the last one otherwise
            assert [float(text) for text in NUMBER.findall(out.getvalue())] == pytest.approx(told, abs=0.011)


def _load(source: object, *rest: object, **how: object) -> object:
    """The programs change no model that has a name, so they share it."""
    return (opened if source == "tasks-4l" else load)(source, *rest, **how)


@pytest.mark.parametrize("page", PAGES)
def test_what_is_not_run_says_why(page: str) -> None:
    for fence in fences(page):
        assert fence.options in ("", *re.findall(r' (?:skip|file|real)="[^"]{5,}"', fence.options)), (
            fence.options
        )
