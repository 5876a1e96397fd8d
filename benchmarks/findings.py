"""What docs/analyses says of the embedded model `tasks-4l`, once more: `python benchmarks/findings.py`.

Each part of results/findings.json is a finding of those pages, with the prompts, seeds and settings that they state.
The answers of suppressors, forced heads, circuits and trained offsets are numbers of one model on made-up sentences.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import xarray as xr
from cpu_report import head, write

import headwater as hw
from headwater import analyses

RESULTS = Path(__file__).parent / "results" / "findings.json"


def forced(model: hw.HookedModel) -> dict[str, Any]:
    """Heads forced onto a wrong colour, 200 prompts: percent answered right and the change in points."""
    pairs = hw.prompt_set("colored_conflict", 200, seed=2, model=model)
    places = {"last": (["1.7", "2.3", "2.7"], -1), "object": (["0.6"], -4)}
    out = {}
    for name, (heads, position) in places.items():
        found = analyses.repair(model, pairs, heads=heads, position=position, movers=["3.0"])
        out[name] = {
            "right": _percent(found.accuracy),
            "change": _percent(found.change.sel(of="accuracy")),
            "new_mistakes": 100 * float(found.new_mistakes.sel(treatment="forced")),
        }
    return out


def circuit(model: hw.HookedModel) -> dict[str, Any]:
    """Edges of indirect objects, chosen by EAP-IG on 48 texts and judged on 48 others."""
    pairs = hw.prompt_set("indirect_object", n=96, seed=0)
    graph = analyses.edge_attribution(model, pairs[:48], steps=5)
    found = analyses.circuit_faithfulness(model, graph, pairs[48:], sizes=[198, 275], selection="greedy")
    kept = found["mean"].sel(score="faithfulness")
    return {
        "edges": int(found.attrs["edges_of_model"]),
        **{f"kept_{size}": float(kept.sel(size=size)) for size in (198, 275)},
    }


def offsets(model: hw.HookedModel) -> dict[str, Any]:
    """Loss of 64 texts under offsets on four heads, learned on 32: heads of the task, of another task, random ones."""
    train, test = (hw.prompt_set("colored_conflict", n, seed=s, model=model) for n, s in ((32, 3), (64, 4)))
    other = hw.prompt_set("indirect_object", 32, seed=3, model=model)
    sets = {"examples": train, "test": test, "other": other}
    found = analyses.offset_controls(
        model, *([e.prompt for e in each] for each in sets.values()),
        answers={name: [e.answer for e in each] for name, each in sets.items()},
        count=4, draws=3, steps=60, rate=0.02,
    )  # fmt: skip
    return {str(name): found.sel(heads=name).values.tolist() for name in found.heads.values}


def suppressors(model: hw.HookedModel) -> dict[str, Any]:
    """How many parts of the last layer lower the token that was likeliest before it, by task."""
    out = {}
    for task, n, seeds in (
        ("capital", 307, (0, 1, 2)),
        ("indirect_object", 200, (0,)),
        ("colored_object", 200, (0,)),
    ):
        pairs = hw.prompt_set(task, n=n, seed=0)
        for seed in seeds:
            found = analyses.suppressors(
                model, [e.prompt for e in pairs], [e.answer for e in pairs], factors=(0.0,), seed=seed
            )
            out[f"{task}_{seed}"] = {
                "prompts": len(pairs),
                "suppressors": int(found.suppressor.sum()),
                "parts": {
                    str(part): float(found["mean"].sel(component=part)) for part in found.component.values
                },
            }
    return out


def _percent(found: xr.DataArray) -> dict[str, Any]:
    """{treatment: {bound: percent}}."""
    return {
        str(name): {str(at): 100 * float(found.sel(treatment=name, bound=at)) for at in found.bound.values}
        for name in found.treatment.values
    }


def main() -> None:
    model = hw.load("tasks-4l")
    report = head("What docs/analyses says of the embedded model, by finding.", torch.get_num_threads())
    parts: dict[str, Callable[[hw.HookedModel], dict[str, Any]]] = {
        "suppressors": suppressors, "forced": forced, "circuit": circuit, "offsets": offsets,
    }  # fmt: skip
    for name, part in parts.items():
        report[name] = part(model)
        print(name, report[name], flush=True)
    write(report, RESULTS)


if __name__ == "__main__":
    main()
