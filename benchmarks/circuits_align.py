"""Directions of tasks-4l that hold the answer of indirect objects, and its position: interchange accuracy by place.

`python benchmarks/circuits_align.py` writes benchmarks/results/circuits_align.json after each row; a run that was
stopped goes on behind the rows that are there.
"""

import json
import sys
import time
from pathlib import Path

import headwater as hw
from headwater import analyses

QUICK = "--quick" in sys.argv
FILE = Path(__file__).parent / "results" / "circuits_align.json"
ROWS = [
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
]
PAIRS, STEPS = (12, 2) if QUICK else (600, 150)

model = hw.load("tasks-4l")
pairs = {
    each: analyses.cross_pairs(model, hw.prompt_set("indirect_object", n=PAIRS), each)
    for each in ("answer", "position")
}
told = json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() and not QUICK else {}
# 20 s to a minute each; results hold those that were run
for variable, what, site, size in ROWS[:1] if QUICK else ROWS:
    name = f"{variable} | {what} {site} | {size}"
    if name in told:
        continue
    where = {"heads": site} if what == "head" else {"layers": [int(site)]}
    begin = time.perf_counter()
    found = analyses.align_subspace(
        model,
        pairs[variable],
        what=what,
        **where,
        size=size,
        steps=STEPS,
        rate=2e-2,
        controls=2,
        batch_size=64,
    )
    told[name] = {by: round(found.accuracy.sel(by=by).item(), 3) for by in found.by.values} | {
        "trained on": found.attrs["trained_on"],
        "judged on": found.attrs["judged_on"],
        "seconds": round(time.perf_counter() - begin, 1),
    }
    print(name, told[name], flush=True)
    if not QUICK:
        FILE.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
