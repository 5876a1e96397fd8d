"""Directions that hold the answer of indirect objects, and its position: interchange accuracy by place and size.

`python benchmarks/circuits_align.py [--models tasks-4l smollm2-135m]` (`headwater models add smollm2-135m` first).
Results go to results/circuits_align.json, each row as it comes; what the file holds is not computed again (`--anew`
begins anew). `--quick` runs one row of tasks-4l on few pairs and writes nothing.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from cpu_report import earlier, head, write

import headwater as hw
from headwater import analyses

RESULTS = Path(__file__).parent / "results" / "circuits_align.json"
Row = tuple[str, str, str, int]  # variable, what is exchanged, layer or head, directions


@dataclass(frozen=True)
class Setting:
    """How much a row takes: prompts that pairs are made of, steps of training, pairs of a batch."""

    prompts: int
    steps: int
    batch: int


SETTINGS = {"tasks-4l": Setting(600, 150, 64), "smollm2-135m": Setting(120, 40, 16)}
QUICK = Setting(12, 2, 64)
ROWS: dict[str, list[Row]] = {
    "tasks-4l": [
        ("answer", "residual", "3", 48),
        ("answer", "residual", "3", 16),
        ("answer", "residual", "3", 4),
        ("answer", "residual", "2", 48),
        ("answer", "mlp", "2", 48),
        ("answer", "mlp", "3", 48),
        ("answer", "head", "2.6", 16),
        ("answer", "head", "3.1", 16),
        ("position", "residual", "3", 16),
        ("position", "residual", "2", 16),
    ],
    # head 20.0 steers the queries of the name movers, of which 23.3 is the strongest
    "smollm2-135m": [
        ("position", "residual", "23", 16),
        ("answer", "residual", "25", 64),
        ("position", "head", "20.0", 16),
        ("answer", "head", "23.3", 32),
        ("position", "residual", "25", 16),
        ("answer", "residual", "23", 64),
        ("answer", "mlp", "29", 64),
    ],
}


def aligned(model: hw.HookedModel, row: Row, asked: Setting) -> dict[str, Any]:
    """One row: interchange accuracy of what was learned and of the controls, on pairs that were not trained on."""
    variable, what, site, size = row
    own: dict[str, Any] = (
        {} if model.name == "tasks-4l" else {"model": model}
    )  # the embedded model has held-out prompts
    pairs = analyses.cross_pairs(model, hw.prompt_set("indirect_object", n=asked.prompts, **own), variable)
    begun = time.process_time()
    found = analyses.align_subspace(
        model, pairs, what=what, **({"heads": site} if what == "head" else {"layers": [int(site)]}), size=size,
        steps=asked.steps, rate=2e-2, controls=2, batch_size=asked.batch,
    )  # fmt: skip
    return {by: round(found.accuracy.sel(by=by).item(), 3) for by in found.by.values} | {
        "of": found.sizes["feature"],
        "answers": len({pair.answer for pair in pairs}),
        "trained_on": found.attrs["trained_on"],
        "judged_on": found.attrs["judged_on"],
        "steps": asked.steps,
        "seconds": round(time.process_time() - begun, 1),
    }


def main() -> None:
    given = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    given.add_argument("--models", nargs="+", default=list(ROWS), choices=list(ROWS))
    given.add_argument("--anew", action="store_true")
    given.add_argument("--quick", action="store_true")
    given.add_argument("--threads", type=int, default=1)
    asked = given.parse_args()
    torch.set_num_threads(asked.threads)
    if asked.quick:
        print(aligned(hw.load("tasks-4l"), ROWS["tasks-4l"][0], QUICK))
        return
    report = head("Interchange accuracy of learned directions, indirect objects.", asked.threads)
    kept = earlier(RESULTS, report, asked.anew)
    report |= {name: kept[name] for name in ROWS if name in kept}
    for name in asked.models:
        model, table = hw.load(name), report.setdefault(name, {})
        for row in ROWS[name]:
            label = "{} | {} {} | {}".format(*row)
            if label not in table:
                table[label] = aligned(model, row, SETTINGS[name])
                print(name, label, table[label], flush=True)
                write(report, RESULTS)


if __name__ == "__main__":
    main()
