"""How near are one backward pass's estimates of patches to the patches themselves, by rule, part and task?

Every row is kept as it comes, and a row that the folder holds is not computed again.
"""

from collections import Counter

import numpy as np
import xarray as xr
from _kept import QUICK, earlier, keep

import headwater as hw
from headwater import analyses

RULES = ("gradient", "relp_released", "relp", "gim", "attnlrp")
PARTS = ("residual", "attention", "mlp")
COUNT, SEED = 2 if QUICK else 12, 0
CASES = [("tasks-4l", "indirect_object"), ("tasks-4l", "colored_object"), ("tasks-4l", "capital")]
CASES += [("smollm2-135m", name) for name in ("indirect_object", "capital", "docstring")]
FEWER = {("smollm2-135m", "docstring"): 3}  # longer prompts


def alike(model, name):
    """Pairs of one length that differ from the same position on, so that their cells can be averaged."""
    given = hw.prompt_set(
        name, 2 if QUICK else 96, seed=SEED, model=None if model.name == "tasks-4l" else model
    )
    sides = [[model.to_tokens(text)[0].tolist() for text in (e.prompt, e.corrupt)] for e in given]
    kinds = [(len(a), next(n for n, token in enumerate(a) if token != b[n])) for a, b in sides]
    usual = Counter(kinds).most_common(1)[0][0]
    count = min(COUNT, FEWER.get((model.name, name), COUNT))
    return [e for e, kind in zip(given, kinds, strict=True) if kind == usual][:count], usual[1]


def pearson(x, y):
    return float(np.corrcoef(x.ravel(), y.ravel())[0, 1])


told = {"seed": SEED, "pairs, at most": COUNT}
before = earlier(told)
for name, task in CASES[:1] if QUICK else CASES:
    model = hw.load(name)
    pairs, first = alike(model, task)
    for part in PARTS:
        cells = f"{name} {task} {part}"
        if cells not in before:
            runs = analyses.patch(model, pairs, what=part)  # the clean cell in the corrupt run
            usable = (
                runs.clean.values - runs.corrupt.values > 1
            )  # a small difference makes shares of it large
            before[cells] = {}
            for rule in RULES:
                near = analyses.patch(model, pairs, what=part, estimate=rule)
                both = (each.values[usable][..., first:].mean(0) for each in (runs, near))
                before[cells][rule] = pearson(*both)
        told[cells] = before[cells]
        print(f"{cells}: {told[cells]}", flush=True)
        keep(before | told, None, model)
rows = {cells: list(row.values()) for cells, row in told.items() if isinstance(row, dict)}
kept = xr.DataArray(
    list(rows.values()), {"cells": list(rows), "rule": list(RULES)}, ("cells", "rule"),
    "Pearson correlation of estimates with runs", {"unit": "correlation"},
)  # fmt: skip
keep(told, hw.figure(kept), model)
