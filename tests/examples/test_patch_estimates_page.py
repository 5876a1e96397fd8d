"""The table of estimated patches on the page is the one that its script has kept. Seen to fail: a digit of the page."""

from __future__ import annotations

import json
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"


def test_the_page_has_the_numbers_of_the_script() -> None:
    told = json.loads((DOCS / "real" / "real_patch_estimates.json").read_text("utf-8"))
    page = (DOCS / "real-models.md").read_text("utf-8").splitlines()
    rows = {cells: row for cells, row in told.items() if isinstance(row, dict)}
    assert len(rows) == 18
    for cells, row in rows.items():
        numbers = " | ".join(f"{value:.2f}" for value in row.values())
        assert f"| {cells} | {numbers} |" in page
    of_mlps = {cells: row for cells, row in rows.items() if cells.endswith("mlp")}
    assert min(row["relp"] for cells, row in of_mlps.items() if "docstring" not in cells) > 0.93
    other = of_mlps["smollm2-135m docstring mlp"]
    assert other["relp"] < other["gradient"]
    for rule, times in (("gim", 11), ("attnlrp", 13)):
        assert sum(row[rule] < row["gradient"] for row in rows.values()) == times
