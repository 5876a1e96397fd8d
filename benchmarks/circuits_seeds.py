"""How much the circuits of four trainings of one small model share, which differ in their seed alone.

`python benchmarks/circuits_seeds.py [--work FOLDER]` trains the softmax model of data/models/sink-2l from each seed, a
few minutes on one thread, finds the circuits of two behaviours in each, and writes results/circuits_seeds.json. What is
in FOLDER is not trained again, and a training that was stopped goes on from its last checkpoint there. `--quick` takes
two seeds that are hardly trained and writes nothing. No weights are kept in the project: they come again from the
seeds.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import networkx as nx
import torch
from cpu_report import head, write
from sink_training import RUNS, language, trained

import headwater as hw
from headwater import analyses
from headwater.analyses._prompts.crossed_pairs import CrossedPair

RESULTS = Path(__file__).parent / "results" / "circuits_seeds.json"
SEEDS, SIZES, PAIRS = (0, 1, 2, 3), (10, 20, 40), 32
LENGTH, AGAIN = 24, 4  # words in front of those that come again, and how many do


def pairs_of(behaviour: str, count: int, seed: str) -> list[CrossedPair]:
    """Pairs of "repeated words" ask for the next of words that come again, of "triggers" for the word before one."""
    drawn, found = random.Random(seed), []
    for _ in range(count):
        *words, other = drawn.sample(language.WORDS, LENGTH + 1)
        if behaviour == "triggers":
            trigger = drawn.choice(language.TRIGGERS)
            clean, corrupt = ([*words[:-1], end, trigger] for end in (words[-1], other))
            answer = words[-1]
        else:
            start = drawn.randrange(1, LENGTH - AGAIN - 1)
            place = start + AGAIN
            answer, again = words[place], words[start:place]
            clean = [*words, *again]
            corrupt = [*words[:place], other, *words[place + 1 :], *again]
        found.append(CrossedPair(" ".join(clean), " ".join(corrupt), answer, (other,)))
    return found


BEHAVIOURS = ("repeated words", "triggers")


def found_in(model: hw.HookedModel, behaviour: str) -> tuple[nx.DiGraph, dict[str, Any]]:
    """The scored edges of a model, how alike the best are when pairs are redrawn, and how well they do on others."""
    pairs = pairs_of(behaviour, 2 * PAIRS, f"circuits {behaviour}")
    graph = analyses.edge_attribution(model, pairs[:PAIRS], steps=5, draws=100)
    curve = analyses.circuit_curve(model, graph, pairs[PAIRS:], seed=0)
    told = {"difference": float(curve.whole.mean() - curve.nothing.mean()), "cmd": curve.cmd.values.tolist()}
    told["stability"] = json.loads(graph.graph["stability"])
    circuits = {str(size): analyses.select_circuit(graph, size) for size in SIZES}
    told["redrawn"] = {size: circuit.graph["stability"] for size, circuit in circuits.items()}
    return graph, told | {"edges_of_model": int(curve.attrs["edges_of_model"])}


def shared(graphs: Sequence[nx.DiGraph]) -> dict[str, Any]:
    """The mean share of circuits of each size with those of the other seeds, heads numbered to fit, and by chance."""
    told = {}
    for size in SIZES:
        found = analyses.circuit_stability(graphs, size, draws=20, seed=0)
        told[str(size)] = {what: float(found["mean"].sel(what=what)) for what in ("heads", "nodes", "edges")}
        told[str(size)]["edges by chance"] = float(found.chance)
    return told


def main() -> None:
    given = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    given.add_argument("--work", type=Path, help="folder of checkpoints; none: all is trained anew")
    given.add_argument("--quick", action="store_true")
    asked = given.parse_args()
    torch.set_num_threads(1)
    settings, seeds = RUNS["softmax"], SEEDS
    if asked.quick:
        settings, seeds = settings | {"steps": 2}, SEEDS[:2]
    report = head("Circuits of one model trained from several seeds.", 1) | {"pairs": PAIRS}
    graphs, report["seeds"] = {name: [] for name in BEHAVIOURS}, {}
    with tempfile.TemporaryDirectory() as folder:
        for seed in seeds:
            model, figures = trained("softmax", settings, asked.work or Path(folder), seed=seed)
            opened = hw.load(model, tokenizer=language.tokenizer())
            told = {what: figures[-1][what] for what in ("step", "loss", "copied_right")}
            for name in BEHAVIOURS:
                graph, told[name] = found_in(opened, name)
                graphs[name].append(graph)
            report["seeds"][str(seed)] = told
            print(seed, told, flush=True)
    report["shared"] = {name: shared(graphs[name]) for name in BEHAVIOURS}
    print(report["shared"])
    if not asked.quick:
        write(report, RESULTS)


if __name__ == "__main__":
    main()
