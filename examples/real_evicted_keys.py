"""What does SmolLM2 lose when keys of a text are evicted: nats per token of what follows, and a needle's answer?"""

import numpy as np
import xarray as xr
from _kept import QUICK, earlier, interval, keep, passages, show

import headwater as hw

SEED = 0
COUNT, LENGTH, DEPTHS, TESTS, DRAWS = (1, 512, 2, 1, 1) if QUICK else (3, 1024, 3, 3, 2)
KEPT = "0.4" if QUICK else "0.15, 0.25, 0.5, 0.75"
TEXTS, NEEDLES = "each text", "each needle of all depths"
model = hw.load("smollm2-135m")
told = {"seed": SEED, "texts": COUNT, "tokens": LENGTH, "depths": DEPTHS, "kept": KEPT, "draws": DRAWS}
told = told | {TEXTS: [], NEEDLES: []} | earlier(told)  # one that was stopped goes on behind its last piece


def by_way(found):
    return {by: found.sel(by=by).values.round(4).tolist() for by in found.by.values.tolist()}


def mean(piece):  # [way][share]
    return {by: np.mean([each[piece][by] for each in told[NEEDLES]], 0).round(3).tolist() for by in ways}


texts = passages(model, COUNT, LENGTH, SEED)
for n in range(len(told[TEXTS]), COUNT):
    curve = hw.analyses.kv_curve(model, texts[n : n + 1], kept=KEPT, draws=DRAWS, seed=SEED + n)
    told[TEXTS].append({"whole": round(float(curve.whole[0]), 4), "excess": by_way(curve.excess)})
    keep(told, None, model)
ways = list(told[TEXTS][0]["excess"])
excess = {by: interval([each["excess"][by] for each in told[TEXTS]]) for by in ways}
told["loss with all keys"] = round(float(np.mean([each["whole"] for each in told[TEXTS]])), 3)
told["excess with 95 % of resampled texts"] = excess
keep(told, None, model)
for n in range(len(told[NEEDLES]), TESTS):
    found = hw.analyses.kv_needles(model, LENGTH, depths=DEPTHS, kept=KEPT, draws=DRAWS, seed=SEED + n)
    pieces = {name: by_way(found[name].mean(("length", "depth"))) for name in ("recall", "loss")}
    wholes = {name: round(float(found[name].mean()), 4) for name in ("whole_recall", "whole_loss")}
    told[NEEDLES].append(pieces | wholes)
    keep(told, None, model)
told |= {
    "needles": DEPTHS * TESTS,
    "recall with all keys": round(float(np.mean([each["whole_recall"] for each in told[NEEDLES]])), 3),
    "loss of answers with all keys": round(float(np.mean([each["whole_loss"] for each in told[NEEDLES]])), 3),
    "recall": mean("recall"),
    "loss of answers": mean("loss"),
}
show(told)
shares = [float(share) for share in KEPT.split(",")]
drawn = xr.DataArray([excess[by][0] for by in ways], {"by": ways, "kept": shares}, ("by", "kept"))
drawn.attrs = {"question": "What does a cache of fewer keys cost?", "unit": "nats per token beyond all keys"}
keep(told, hw.figure(drawn), model)
