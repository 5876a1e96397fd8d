"""Time and memory of EAP-IG over all edges of a language model: smollm2-135m, 123,211 edges, 5 steps, 16 pairs.

`python benchmarks/edge_attribution.py [--pairs 16] [--steps 5] [--threads 2]` (`headwater models add smollm2-135m`
first). Pairs are indirect objects; a process of its own loads the model, runs the attribution once and tells its
seconds, those of all threads together, and the highest memory of the whole process, the model with it. The result is
written to results/edge_attribution.json.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from cpu_report import head, in_a_process, write

RESULTS = Path(__file__).parent / "results" / "edge_attribution.json"
MODEL, SEED = "smollm2-135m", 0
RUN = f"""
import sys, torch
import headwater as hw
count, steps, threads = map(int, sys.argv[1:])
torch.set_num_threads(threads)
model = hw.load({MODEL!r})
pairs = hw.prompt_set("indirect_object", count, seed={SEED}, model=model)
def run():
    graph = hw.analyses.edge_attribution(model, pairs, steps=steps)
    assert sum(score is not None for _, _, score in graph.edges(data="score")) == 123211
measured(run, 1)
"""


def main() -> None:
    given = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("pairs", 16), ("steps", 5), ("threads", 2)):
        given.add_argument(f"--{name}", type=int, default=value)
    asked = given.parse_args()
    report = head("EAP-IG over all edges: time and the highest memory of the process.", asked.threads)
    found = in_a_process(RUN, asked.pairs, asked.steps, asked.threads, threads=asked.threads)
    report |= {"model": MODEL, "edges": 123211, "pairs": asked.pairs, "steps": asked.steps, **found}
    for name, value in found.items():
        print(name, value)
    if "not_run" not in found:
        write(report, RESULTS)


if __name__ == "__main__":
    main()
