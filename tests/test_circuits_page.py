"""The table of CMD and CPR on the page of circuits is that of the kept results of benchmarks/circuits_mib.py."""

from __future__ import annotations

import json
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_method_stands_on_the_page_with_what_was_found() -> None:
    kept = json.loads((ROOT / "benchmarks" / "results" / "circuits_mib.json").read_text(encoding="utf-8"))
    page = (ROOT / "docs" / "analyses" / "circuits.md").read_text(encoding="utf-8")
    table = kept["tasks-4l"]
    methods = list(next(iter(table.values())))
    assert {"random", "exact", "EAP", "EAP-IG inputs", "EAP-IG activations"} <= set(methods)
    for method in methods:
        cells = [
            "{:.2f} ({:.2f} to {:.2f}) / {:.2f}".format(*found[method]["cmd"], found[method]["cpr"][0])
            for found in table.values()
        ]
        assert f"| {method} | {' | '.join(cells)} |" in page
    for method in ("EAP-IG inputs", "EAP", "information flow routes", "random"):
        found = kept["smollm2-135m"]["indirect_object"][method]
        line = "{:.2f} ({:.2f} to {:.2f}) / {:.2f}".format(*found["cmd"], found["cpr"][0])
        assert f"| {method} | {line} |" in page
