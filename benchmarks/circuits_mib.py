"""How well each method finds circuits, by the measures of the Mechanistic Interpretability Benchmark: CMD and CPR.

`python benchmarks/circuits_mib.py [--models tasks-4l smollm2-135m]` (`headwater models add smollm2-135m` first). Edges
are scored on some pairs of prompts and judged on others by `circuit_curve`: the logit difference of the two answers,
edges outside the circuit carrying the corrupt prompt. Information flow routes build their circuits greedily, as in the
benchmark; random scores are uniform numbers. Every result is written to results/circuits_mib.json as it comes, and what
the file holds is not computed again (`--anew` begins anew). On smollm2-135m (123,211 edges) `exact` would be a pass for
each edge and pair, so edges drawn at random are measured, and the scores of the other methods are held to them
("sampled exact": Pearson's r, and Spearman's of sizes); a sample makes no circuit. EAP-IG with activations runs two
steps on two pairs there. `--quick` runs one task of tasks-4l on two pairs and writes nothing.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import torch
from cpu_report import earlier, head, write
from scipy import stats

import headwater as hw
from headwater import analyses

RESULTS = Path(__file__).parent / "results" / "circuits_mib.json"
SEED = 17
SETS = {
    "tasks-4l": ["indirect_object", "capital", "colored_object", "repeated_tokens"],
    "smollm2-135m": ["indirect_object", "capital", "greater_than", "docstring"],
}
PAIRS = {"tasks-4l": 16, "smollm2-135m": 6}  # that edges are scored on, and as many others for the judgement
FEWER = {("smollm2-135m", "docstring"): 4}  # longer prompts
METHODS = {
    "random": {},
    "information flow routes": {},
    "EAP": {"steps": 1},
    "EAP-IG inputs": {"steps": 5},
    "EAP-IG activations": {"steps": 5, "how": "activations_released"},
    "both ends": {"how": "clean_corrupt"},
    "exact": {"how": "exact"},
}
LEFT_OUT = {"smollm2-135m": ["exact"]}
SAMPLED = "sampled exact"
SAMPLE, ITS_PAIRS = 100, 3  # edges of smollm2-135m, and pairs on which each is changed
SMALLER = {("smollm2-135m", "EAP-IG activations"): {"steps": 2, "pairs": 2}}


def scored(model: hw.HookedModel, method: str, pairs: list[Any]) -> tuple[nx.DiGraph, dict[str, Any]]:
    """The graph of a method, and the settings that made it."""
    if method == "information flow routes":
        return analyses.information_flow_routes(model, [pair.prompt for pair in pairs]), {"pairs": len(pairs)}
    asked = METHODS[method] | SMALLER.get((model.name, method), {})
    some = pairs[: asked.pop("pairs", len(pairs))]
    if method == "random":
        graph = analyses.information_flow_routes(model, [pairs[0].prompt])  # for its edges alone
        draw = np.random.default_rng(SEED)
        for _, _, about in graph.edges(data=True):
            if "score" in about:
                about["score"] = float(draw.random())
        return graph, {"seed": SEED}
    return analyses.edge_attribution(model, some, draws=1, **asked), {"pairs": len(some), **asked}


def sampled(model: hw.HookedModel, name: str) -> dict[str, Any]:
    """How near the scores of some methods come to the effects of edges drawn at random, on the same pairs."""
    begun = time.process_time()
    pairs = hw.prompt_set(name, 2 * pairs_of(model, name), seed=SEED, model=model)[:ITS_PAIRS]
    exact = analyses.edge_attribution(
        model, pairs, how="exact", sample=SAMPLE, seed=SEED, draws=1, batch_size=16
    )
    edges = [(u, v) for u, v, score in exact.edges(data="score") if score is not None]
    effects = np.array([exact.edges[edge]["score"] for edge in edges])
    found = {}
    for method in ("EAP", "EAP-IG inputs", "information flow routes", "random"):
        graph, _ = scored(model, method, pairs)
        scores = np.array([graph.edges[edge]["score"] for edge in edges])
        found[method] = {
            "pearson": float(np.corrcoef(scores, effects)[0, 1]),
            "spearman_of_sizes": float(
                np.corrcoef(stats.rankdata(np.abs(scores)), stats.rankdata(np.abs(effects)))[0, 1]
            ),
        }
    return {
        "edges": len(edges), "pairs": len(pairs), "against": found, "seconds": round(time.process_time() - begun, 1),
        "effect_size": [float(each) for each in np.quantile(np.abs(effects), [0.5, 0.9, 1.0])],
        "difference": measure_apart(model, pairs),
    }  # fmt: skip


def measure_apart(model: hw.HookedModel, pairs: list[Any]) -> float:
    """The mean difference of the measure between clean and corrupt prompts, to which effects of edges compare."""
    runs = analyses.patch(model, pairs, what="mlp", estimate="gradient")
    return float((runs.clean - runs.corrupt).mean())


def pairs_of(model: hw.HookedModel, name: str) -> int:
    return FEWER.get((model.name, name), PAIRS[model.name])


def judged(model: hw.HookedModel, method: str, name: str) -> dict[str, Any]:
    count = pairs_of(model, name)
    pairs = hw.prompt_set(name, 2 * count, seed=SEED, model=model)
    begun = time.process_time()
    graph, settings = scored(model, method, pairs[:count])
    between = time.process_time()
    selection = "greedy" if method == "information flow routes" else "top"
    found = analyses.circuit_curve(model, graph, pairs[count:], selection=selection, seed=SEED)
    return {
        "cmd": found.cmd.values.tolist(),
        "cpr": found.cpr.values.tolist(),
        "f": dict(zip(found.ranking.values.tolist(), found.f.sel(bound="mean").values.tolist(), strict=True)),
        "edges": found.edges.values.tolist(),
        "edges_of_model": int(found.attrs["edges_of_model"]),
        "scored_on": settings,
        "judged_on": count,
        "seconds": [round(between - begun, 1), round(time.process_time() - between, 1)],
    }


def main() -> None:
    given = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    given.add_argument("--models", nargs="+", default=list(SETS), choices=list(SETS))
    given.add_argument("--methods", nargs="+", default=[*METHODS, SAMPLED], choices=[*METHODS, SAMPLED])
    given.add_argument(
        "--sets", nargs="+", default=sorted({name for names in SETS.values() for name in names})
    )
    given.add_argument("--quick", action="store_true")
    given.add_argument("--anew", action="store_true")
    given.add_argument("--threads", type=int, default=1)
    asked = given.parse_args()
    torch.set_num_threads(asked.threads)
    if asked.quick:
        PAIRS["tasks-4l"], model = 2, hw.load("tasks-4l")
        for method in METHODS:
            tell("tasks-4l", "indirect_object", method, judged(model, method, "indirect_object"))
        return
    report = head("CMD and CPR of methods that score edges, with 95 % over pairs.", asked.threads)
    kept = earlier(RESULTS, report, asked.anew)
    report |= {name: kept[name] for name in SETS if name in kept}
    for name in asked.models:
        model, table = hw.load(name), report.setdefault(name, {})
        out = LEFT_OUT.get(name, [SAMPLED])
        for method in (method for method in asked.methods if method not in out):
            for task in (task for task in SETS[name] if task in asked.sets):
                if method in table.get(task, {}):
                    continue
                result = sampled(model, task) if method == SAMPLED else judged(model, method, task)
                table.setdefault(task, {})[method] = result
                tell(name, task, method, result)
                write(report, RESULTS)


def tell(name: str, task: str, method: str, result: dict[str, Any]) -> None:
    if "cmd" in result:
        print(
            name,
            task,
            method,
            "CMD",
            result["cmd"][0],
            "CPR",
            result["cpr"][0],
            result["seconds"],
            flush=True,
        )
    else:
        print(name, task, method, result, flush=True)


if __name__ == "__main__":
    main()
