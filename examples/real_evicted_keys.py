"""What does SmolLM2 lose when keys of a text are evicted: nats per token of what follows, and a needle's answer?"""

from _kept import QUICK, interval, keep, passages, show

import headwater as hw

SEED = 0
COUNT, LENGTH, TESTS = (1, 512, 1) if QUICK else (3, 1024, 1)
KEPT = "0.4" if QUICK else "0.15, 0.25, 0.5"
model = hw.load("smollm2-135m")
texts = passages(model, COUNT, LENGTH, SEED)
curve = hw.analyses.kv_curve(model, texts, kept=KEPT, draws=1 if QUICK else 2, seed=SEED)
needle = hw.analyses.kv_needles(
    model,
    LENGTH,
    depths=2 if QUICK else 3,
    tests=TESTS,
    kept=KEPT,
    draws=1 if QUICK else 2,
    seed=SEED,
)
more = (curve.loss - curve.whole).transpose("batch", "by", "kept")
recall = needle.recall.mean(("length", "depth"))
told = {
    "seed": SEED,
    "texts": COUNT,
    "tokens": LENGTH,
    "needles": needle.tests,
    "kept": curve.kept.values.tolist(),
    "loss with all keys": round(float(curve.whole.mean()), 3),
    "excess with 95 % of resampled texts": {
        by: [[n[k] for n in interval(more.sel(by=by))] for k in range(curve.sizes["kept"])]
        for by in curve.by.values.tolist()
    },
    "recall with all keys": round(float(needle.whole_recall.mean()), 3),
    "loss of answers with all keys": round(float(needle.whole_loss.mean()), 3),
    "recall": {by: recall.sel(by=by).values.round(3).tolist() for by in needle.by.values.tolist()},
    "loss of answers": {
        by: needle.loss.mean(("length", "depth")).sel(by=by).values.round(3).tolist()
        for by in needle.by.values.tolist()
    },
    "recall, least and largest random draw": needle.random_range.values.round(3).tolist(),
}
show(told)
keep(told, hw.figure(curve.excess.assign_attrs(unit="nats per token")), model)
