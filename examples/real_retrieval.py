"""Which heads of SmolLM2 carry a sentence out of up to 4,096 tokens, and what is lost without them?"""

import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from _kept import QUICK, keep, show
from scipy.stats import spearmanr

import headwater as hw

SEED = 0
LENGTHS, DEPTHS, TESTS = ([256], 2, 1) if QUICK else ([512, 1024, 2048, 4096], 5, 1)
MASKED = [1, 4] if QUICK else [2, 8, 32]
# a run that was stopped goes on from here; the other file has the seconds of all runs
PIECES = None if QUICK else Path(tempfile.gettempdir()) / "real_retrieval.jsonl"
TIMES = Path(tempfile.gettempdir()) / "real_retrieval.seconds"
model = hw.load("smollm2-135m")
begin = time.perf_counter()
try:
    found = hw.analyses.retrieval_heads(
        model,
        lengths=LENGTHS,
        depths=DEPTHS,
        tests=TESTS,
        masked=MASKED,
        controls=3,
        seed=SEED,
        resume=PIECES,
    )
finally:
    if not QUICK:
        with TIMES.open("a") as file:
            print(time.perf_counter() - begin, file=file)
seconds = [time.perf_counter() - begin] if QUICK else [float(line) for line in TIMES.read_text().split()]
scores = found.retrieval.values.ravel()
edges = [
    ("0", scores == 0),
    ("0 to 0.1", (scores > 0) & (scores <= 0.1)),
    ("0.1 to 0.5", (scores > 0.1) & (scores <= 0.5)),
]
told = {
    "seed": SEED,
    "tests": found.of,
    "passed": found.passed,
    "minutes": round(sum(seconds) / 60, 1),
    "threads": torch.get_num_threads(),
    "recall by length": dict(
        zip(map(str, LENGTHS), found.recall.mean("depth").values.round(3).tolist(), strict=True)
    ),
    "heads by retrieval score": {
        name: float(here.mean().round(4)) for name, here in [*edges, ("above 0.5", scores > 0.5)]
    },
}
for name in ("retrieval", "query_focused"):
    best = np.argsort(-found[name].values.ravel(), kind="stable")[:8]
    told[f"highest {name}"] = {
        f"{n // model.n_heads}.{n % model.n_heads}": round(float(found[name].values.ravel()[n]), 3)
        for n in best
    }
both = spearmanr(found.retrieval.values.ravel(), found.query_focused.values.ravel())
told["Spearman of both scores"] = round(float(both[0]), 3)  # pyright: ignore[reportArgumentType]
drawn = [name for name in found.by.values if name.startswith("random")]
for measure in ("masked_recall", "masked_loss"):
    curve = found[measure]
    told[measure] = {
        name: curve.sel(by=name).values.round(3).tolist() for name in ("none", "retrieval", "query_focused")
    }
    told[measure]["random, mean"] = curve.sel(by=drawn).mean("by").values.round(3).tolist()
    told[measure]["random, least"] = curve.sel(by=drawn).min("by").values.round(3).tolist()
    told[measure]["random, most"] = curve.sel(by=drawn).max("by").values.round(3).tolist()
told["masked"] = MASKED
show(told)
keep(told, hw.figure(found.retrieval), model)
if PIECES is not None:
    PIECES.unlink()
    TIMES.unlink()
