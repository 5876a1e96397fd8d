"""The tables on the page of circuits are those of the kept results of benchmarks/circuits_*.py."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from headwater import analyses

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
    judged = {name for task in tasks for name, found in larger[task].items() if "cmd" in found}
    assert judged >= {
        "EAP-IG inputs",
        "EAP-IG activations",
        "both ends",
        "EAP",
        "information flow routes",
        "random",
    }
    for method in judged:
        cells = [cell(larger[task][method]) for task in tasks]
        assert f"| {method} | {' | '.join(cells)} |" in page
    routes, best = (
        larger["indirect_object"][name]["f"]["absolute"]
        for name in ("information flow routes", "EAP-IG inputs")
    )
    assert f"(f = {routes[8]:.2f})" in page
    assert f"by EAP-IG carry {best[0]:.2f} of it" in page
    rows = {"Spearman of sizes": "spearman_of_sizes", "Pearson": "pearson"}
    words_of = {
        "indirect_object": "indirect objects",
        "capital": "capitals",
        "greater_than": "greater-than",
        "docstring": "docstrings",
    }
    for task, words in words_of.items():
        drawn = larger[task]["sampled exact"]
        for statistic, name in rows.items():
            numbers = " | ".join(f"{each[name]:.2f}" for each in drawn["against"].values())
            largest = f"{drawn['effect_size'][-1]:.2f} of {drawn['difference']:.1f}"
            assert f"| {words} | {statistic} | {numbers} | {largest} |" in page
        assert drawn["effect_size"][0] < 0.0005


def cell(found: dict) -> str:
    return "{:.2f} ({:.2f} to {:.2f}) / {:.2f}".format(*found["cmd"], found["cpr"][0])


def test_the_page_tells_the_accuracy_of_learned_directions() -> None:
    kept = read("circuits_align.json")
    page = (ROOT / "docs" / "analyses" / "circuits.md").read_text(encoding="utf-8")
    rows = [
        (model, label, row) for model in ("tasks-4l", "smollm2-135m") for label, row in kept[model].items()
    ]
    assert len(rows) >= 15
    place, name = (
        kept["smollm2-135m"][label] for label in ("position | residual 23 | 16", "answer | residual 25 | 64")
    )
    assert place["learned"] > place["full"] > place["random"]
    assert name["full"] > name["learned"] > name["random"]
    for model, label, row in rows:
        variable, place, size = label.split(" | ")
        shares = " | ".join(f"{row[by]:.2f}" for by in ("learned", "full", "random", "none"))
        assert f"| {model} | {variable} | {place} | {size} of {row['of']} | {shares} |" in page
    many, few = (kept["tasks-4l"][f"answer | residual 3 | {size}"] for size in (48, 16))
    told = " ".join((analyses.align_subspace.__doc__ or "").split())
    numbers = [f"{value:.2f}".lstrip("0") for value in (many["learned"], few["learned"], many["full"])]
    says = "of {} names, 48 directions of 256 give {}, 16 {}, the vector {}."
    assert says.format(many["answers"], *numbers) in told


def test_the_page_tells_what_circuits_of_several_seeds_share() -> None:
    kept = read("circuits_seeds.json")
    page = (ROOT / "docs" / "analyses" / "circuits.md").read_text(encoding="utf-8")
    assert len(kept["seeds"]) == 4
    for behaviour, sizes in kept["shared"].items():
        for size, told in sizes.items():
            shares = (f"{told[what]:.2f}" for what in ("heads", "nodes", "edges", "edges by chance"))
            redrawn = np.mean([seed[behaviour]["redrawn"][size] for seed in kept["seeds"].values()])
            assert f"| {behaviour} | {size} | {' | '.join(shares)} | {redrawn:.2f} |" in page
        assert f"{sizes['10']['edges']:.2f} " in page
    again = [
        seed[behaviour]["stability"]["0.1"] for seed in kept["seeds"].values() for behaviour in kept["shared"]
    ]
    assert f"redrawn on one model, {min(again):.2f} or more" in page
    (copied,) = {f"{seed['copied_right']:.2f}" for seed in kept["seeds"].values()}
    assert f"({copied} of copied words right in each)" in page


def read(name: str) -> dict:
    return json.loads((ROOT / "benchmarks" / "results" / name).read_text(encoding="utf-8"))
