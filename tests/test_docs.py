"""The pages under docs/: every analysis has its section.

Seen to fail with a section taken out.
"""

from __future__ import annotations

import re
from pathlib import Path

from headwater.analyses._catalogue.catalogue import catalogue

DOCS = Path(__file__).parents[1] / "docs"


def test_every_analysis_has_a_section_on_the_page_of_its_room() -> None:
    stated = {
        page.stem: re.findall(r"^## (\w+): ", page.read_text(encoding="utf-8"), re.MULTILINE)
        for page in (DOCS / "analyses").glob("*.md")
    }
    rooms: dict[str, list[str]] = {}
    for name, entry in catalogue().items():
        rooms.setdefault(entry.function.__module__.split(".")[2], []).append(name)
    assert {room: sorted(names) for room, names in stated.items()} == rooms
