"""The table of attributions on the page is the one that its script has kept. Seen to fail: a digit of the page."""

from __future__ import annotations

import json
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"


def test_the_page_has_the_numbers_of_the_script() -> None:
    told = json.loads((DOCS / "real" / "real_attributions.json").read_text("utf-8"))
    page = (DOCS / "real-models.md").read_text("utf-8").splitlines()
    rows = {name: row for name, row in told.items() if isinstance(row, dict)}
    assert {"RelP", "RelP, as released", "GIM", "AttnLRP", "gradient × input", "by chance"} <= set(rows)
    for name, row in rows.items():
        cells = [f"{row['first token'][0]:.4f}"]
        for what in ("agreement", "agreement, others", "drop", "drop, others"):
            cells.append("{:.2f} ({:.2f} to {:.2f})".format(*row[what]))
        assert f"| {name} | {' | '.join(cells)} |" in page
