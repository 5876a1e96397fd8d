"""Which edges carry an indirect object, how few of them do it alone, and the circuit in a file that says so again."""

import tempfile
from pathlib import Path

import headwater as hw
from headwater import analyses

model = hw.load("tasks-4l")
examples = hw.prompt_set("indirect_object", n=16)
chosen_on, judged_on = examples[:8], examples[8:]  # each has a prompt, a corrupt twin, an answer

graph = analyses.edge_attribution(model, chosen_on, steps=3)
scores = {(u, v): s for u, v, s in graph.edges(data="score") if s is not None}
print("edges that help most (drop of the logit difference without them):")
for u, v in sorted(scores, key=lambda edge: -scores[edge])[:6]:
    print(f"  {u:>6} → {v:<7}{scores[u, v]:7.2f}")

found = analyses.circuit_faithfulness(model, graph, judged_on, sizes=[100, 200, 300], selection="greedy")
print(f"share of the difference that a circuit keeps, of {found.attrs['edges_of_model']} edges:")
for n, part in found.groupby("size"):
    mean, low, high = (part[name].sel(score="faithfulness").item() for name in ("mean", "low", "high"))
    print(f"  {n} edges: {mean:.2f} ({low:.2f} to {high:.2f})")

with tempfile.TemporaryDirectory() as folder:
    file = analyses.write_circuit(
        analyses.select_circuit(graph, 300, "greedy"), Path(folder) / "circuit.graphml"
    )
    again = analyses.circuit_faithfulness(model, file, judged_on)
print(f"from the file alone: {again['mean'].sel(score='faithfulness').item():.2f}")
