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
        assert f"| {method} | {' | '.join(cell(found[method]) for found in table.values())} |" in page
    tasks = ("indirect_object", "capital", "greater_than", "docstring")
    larger = kept["smollm2-135m"]
    everywhere = set.intersection(
        *({name for name in larger[task] if "cmd" in larger[task][name]} for task in tasks)
    )
    assert everywhere >= {"EAP-IG inputs", "EAP", "information flow routes", "random"}
    for method in everywhere:
        assert f"| {method} | {' | '.join(cell(larger[task][method]) for task in tasks)} |" in page
    routes, best = (
        larger["indirect_object"][name]["f"]["absolute"]
        for name in ("information flow routes", "EAP-IG inputs")
    )
    assert f"(f = {routes[8]:.2f})" in page
    assert f"by EAP-IG carry {best[0]:.2f} of it" in page
    drawn = larger["capital"]["sampled exact"]
    rows = {"Spearman of sizes": "spearman_of_sizes", "Pearson": "pearson"}
    for words, name in rows.items():
        assert (
            f"| {words} | {' | '.join(f'{each[name]:.2f}' for each in drawn['against'].values())} |" in page
        )
    half, _, largest = drawn["effect_size"]
    assert half < 0.0001
    assert f"the largest is {largest:.2f}, of a difference of\n{drawn['difference']:.1f})" in page


def cell(found: dict) -> str:
    return "{:.2f} ({:.2f} to {:.2f}) / {:.2f}".format(*found["cmd"], found["cpr"][0])


def test_the_page_tells_the_accuracy_of_learned_directions() -> None:
    kept = json.loads((ROOT / "benchmarks" / "results" / "circuits_align.json").read_text(encoding="utf-8"))
    page = (ROOT / "docs" / "analyses" / "circuits.md").read_text(encoding="utf-8")
    told = (
        "{learned:.2f} of the held-out answers, the whole vector {full:.2f}, random directions {random:.2f}"
    )
    assert told.format(**kept["answer | residual 3 | 48"]) in " ".join(page.split())
