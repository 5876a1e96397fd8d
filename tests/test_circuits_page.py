"""The tables on the page of circuits are those of the kept results of benchmarks/circuits_*.py."""

from __future__ import annotations

import json
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_method_stands_on_the_page_with_what_was_found() -> None:
    kept = read("circuits_mib.json")
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
    rows = {"Spearman of sizes": "spearman_of_sizes", "Pearson": "pearson"}
    words_of = {"indirect_object": "indirect objects", "capital": "capitals", "greater_than": "greater-than"}
    for task, words in words_of.items():
        drawn = larger[task]["sampled exact"]
        for statistic, name in rows.items():
            numbers = " | ".join(f"{each[name]:.2f}" for each in drawn["against"].values())
            largest = f"{drawn['effect_size'][-1]:.2f} of {drawn['difference']:.1f}"
            assert f"| {words} | {statistic} | {numbers} | {largest} |" in page
        assert drawn["effect_size"][0] < 0.0001


def cell(found: dict) -> str:
    return "{:.2f} ({:.2f} to {:.2f}) / {:.2f}".format(*found["cmd"], found["cpr"][0])


def test_the_page_tells_the_accuracy_of_learned_directions() -> None:
    kept = read("circuits_align.json")
    page = (ROOT / "docs" / "analyses" / "circuits.md").read_text(encoding="utf-8")
    told = (
        "{learned:.2f} of the held-out answers, the whole vector {full:.2f}, random directions {random:.2f}"
    )
    assert told.format(**kept["answer | residual 3 | 48"]) in " ".join(page.split())


def read(name: str) -> dict:
    return json.loads((ROOT / "benchmarks" / "results" / name).read_text(encoding="utf-8"))
