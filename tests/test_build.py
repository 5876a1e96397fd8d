"""A checkout whose links are text files is refused before anything is installed.

Seen to fail with a hook that does not look.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def hook(root: Path):
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.LinksAreLinks(str(root), {}, None, None, str(root), "wheel")


def test_links_that_are_text_are_refused_in_one_line(tmp_path: Path) -> None:
    hook(ROOT).initialize("standard", {})
    (tmp_path / "headwater").mkdir()
    for link in (ROOT / "headwater").iterdir():
        if link.is_symlink():
            (tmp_path / "headwater" / link.name).write_text(f"../{link.name}")
    with pytest.raises(SystemExit, match=r"git clone -c core\.symlinks=true URL") as caught:
        hook(tmp_path).initialize("standard", {})
    assert "\n" not in str(caught.value)
