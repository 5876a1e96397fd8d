"""The numbers of docs/vision.md: each block is what its script prints, and each script has its block.

A block opens with ```text example="vision_NAME"; within="0.05" behind it is how far a number may lie from what is
printed, 0.011 where nothing stands. A line of the block may be cut to "…". The script is run as a user would run it.

Seen to fail with a number changed on the page, a word changed, a script without a block and a block without a script.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from headwater.lens.trained.joined import joined

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "vision.md").read_text(encoding="utf-8")
SCRIPTS = {path.stem: path for path in sorted((ROOT / "examples").glob("vision_*.py"))}
BLOCK = re.compile(r'^```text example="(\w+)"(?: within="([\d.]+)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)
BLOCKS = {name: (float(within or 0.011), text) for name, within, text in BLOCK.findall(PAGE)}
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e-?\d+)?")


def test_every_script_has_its_block_and_every_block_its_script() -> None:
    assert sorted(BLOCKS) == sorted(SCRIPTS)
    assert (
        len(BLOCK.findall(PAGE)) == len(re.findall(r"^```text example=", PAGE, re.MULTILINE)) == len(BLOCKS)
    )


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_is_short_and_its_figure_is_there(name: str) -> None:
    assert len(SCRIPTS[name].read_text(encoding="utf-8").splitlines()) < 60
    for figure in re.findall(rf"\((vision/{name}\.\w+)\)", PAGE):
        assert (ROOT / "docs" / figure).is_file(), figure


@pytest.mark.slow
@pytest.mark.page
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_prints_what_the_page_says(name: str) -> None:
    for each in joined().values():
        if f'"{each.name}"' in SCRIPTS[name].read_text(encoding="utf-8") and not each.is_there:
            pytest.skip(f"{' and '.join(each.parts)} have not been added: headwater models add {each.name}")
    done = subprocess.run(
        [sys.executable, str(SCRIPTS[name])], capture_output=True, text=True, timeout=1800, cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},  # these scripts with the code beside them
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    within, text = BLOCKS[name]
    printed, said = done.stdout.strip().splitlines(), text.strip().splitlines()
    assert len(printed) == len(said)
    for here, there in zip(printed, said, strict=True):
        start = there.partition("…")[0]
        here = here if start == there else here[: len(start)]
        assert NUMBER.sub("#", here).split() == NUMBER.sub("#", start).split()
        told, found = ([float(each) for each in NUMBER.findall(line)] for line in (start, here))
        assert found == pytest.approx(told, abs=within), there
