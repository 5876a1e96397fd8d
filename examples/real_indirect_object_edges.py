"""How few edges of SmolLM2 carry the indirect object alone, and do other prompts choose the same ones?"""

import numpy as np
import xarray as xr
from _kept import QUICK, keep

import headwater as hw
from headwater import analyses

SEED, COUNT, SIZES = 0, 1 if QUICK else 8, [300] if QUICK else [100, 300, 1000, 3000, 10000]
rng, model = np.random.default_rng(SEED), hw.load("smollm2-135m")
examples = hw.prompt_set("indirect_object", 3 * COUNT, seed=SEED + 1, model=model)
found_on, again, judged_on = (examples[n * COUNT : (n + 1) * COUNT] for n in range(3))


def judged(graph):  # the share of the logit difference that circuits keep, with its interval
    found = analyses.circuit_faithfulness(model, graph, judged_on, sizes=SIZES, selection="greedy")
    return found[["mean", "low", "high"]].sel(score="faithfulness").to_array().values.T


graph, other = analyses.edge_attribution(model, found_on), analyses.edge_attribution(model, again)  # EAP-IG
edges = [edge for edge in graph.edges if "score" in graph.edges[edge]]
scores = [graph.edges[edge]["score"] for edge in edges]
told = {"edges": len(edges), "found on": COUNT, "judged on": COUNT, "seed": SEED}
told["largest"] = {
    f"{u} → {v}": graph.edges[u, v]["score"] for u, v in (edges[n] for n in np.argsort(scores)[:-9:-1])
}
told["most against"] = {
    f"{u} → {v}": graph.edges[u, v]["score"] for u, v in (edges[n] for n in np.argsort(scores)[:5])
}
for size in SIZES:
    two = [analyses.select_circuit(each, size, "greedy") for each in (graph, other)]
    shared = analyses.circuit_overlap(*two, graph).sel(what="edges")
    told[f"shared with other prompts, {size} edges"] = [float(shared.share), float(shared.chance)]
curves = {"ranked": judged(graph)}
for draw in (
    (1,) if QUICK else (1, 2)
):  # the same scores at random edges, so that circuits hang together as well
    for edge, score in zip(edges, rng.permutation(scores), strict=True):
        graph.edges[edge]["score"] = float(score)
    curves[f"random {draw}"] = judged(graph)
told |= {f"kept by {name}": dict(zip(SIZES, rows.tolist(), strict=True)) for name, rows in curves.items()}
for name, value in told.items():
    print(f"{name}: {value}")
kept = xr.DataArray(
    np.stack(list(curves.values()))[..., 0], {"edges are": list(curves), "size": SIZES}, ("edges are", "size"),
    "share of the logit difference kept", {"unit": "share"},
)  # fmt: skip
keep(told, hw.figure(kept), model)
