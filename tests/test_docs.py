"""The pages under docs/: every analysis has its section, and the site is built without a warning and without a network.

Seen to fail with a section taken out, a page in no contents, a link to nowhere, a public name that no page
shows, and a script from another host.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import headwater as hw
from headwater import analyses
from headwater.analyses._catalogue.catalogue import catalogue

DOCS = Path(__file__).parents[1] / "docs"
LOADED = re.compile(
    r"""<(?:script|img|iframe|source)[^>]+src=["']?(?:https?:)?//[^>]*>"""
    r"""|<link(?![^>]*rel="canonical")[^>]+href=["']?(?:https?:)?//[^>]*>|(?:@import|url\()\s*["']?(?:https?:)?//"""
)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site. A page in no contents and a link to nowhere are warnings, and so errors."""
    pytest.importorskip("sphinx", reason="the extra `docs` is not installed")
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", DOCS, out]
    run = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stderr
    return out


@pytest.mark.slow
def test_the_site_asks_no_other_host_for_anything(site: Path) -> None:
    pages = [*site.rglob("*.html"), *site.rglob("*.css")]
    assert len(pages) > 20
    assert {p.name: f[0] for p in pages if (f := LOADED.findall(p.read_text(encoding="utf-8")))} == {}


@pytest.mark.slow
def test_every_public_name_is_in_the_reference(site: Path) -> None:
    from sphinx.util.inventory import InventoryFile

    with (site / "objects.inv").open("rb") as file:
        listed = InventoryFile.load(file, "", lambda base, path: path)
    shown = {name for kind, names in listed.items() if kind.startswith("py:") for name in names}
    wanted = {
        f"headwater.{name}"
        for name in hw.__all__
        if name != "__version__" and not isinstance(getattr(hw, name), ModuleType)
    }
    wanted |= {f"headwater.losses.{name}" for name in hw.losses.__all__}
    wanted |= {f"headwater.recipes.{name}" for name in hw.recipes.__all__}
    wanted |= {f"headwater.analyses.{name}" for name in dir(analyses) if name[0] != "_"}
    assert wanted - shown == set()


def test_every_analysis_has_a_section_on_the_page_of_its_room() -> None:
    stated = {
        page.stem: re.findall(r"^## (\w+): ", page.read_text(encoding="utf-8"), re.MULTILINE)
        for page in (DOCS / "analyses").glob("*.md")
    }
    rooms: dict[str, list[str]] = {}
    for name, entry in catalogue().items():
        rooms.setdefault(entry.function.__module__.split(".")[2], []).append(name)
    assert {room: sorted(names) for room, names in stated.items() if names} == rooms
