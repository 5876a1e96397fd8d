"""How much of the key-value cache does SmolLM2 need on a long text: first tokens, a window, or heavy hitters?"""

import numpy as np
import torch
import xarray as xr
from _kept import QUICK, interval, keep, passages, show

import headwater as hw

SEED = 0
LENGTH, BUDGETS, STRETCH = (256, [64], 32) if QUICK else (4096, [64, 256, 1024], 256)
model = hw.load("smollm2-135m")
ids = passages(model, 1, LENGTH, SEED)


def losses(*edits):  # nats per token, the mean of each stretch of the text
    with model.edit(*edits):
        logits = model(ids)[0, :-1].split(STRETCH)
    pairs = zip(logits, ids[0, 1:].split(STRETCH), strict=True)
    return np.array([float(torch.nn.functional.cross_entropy(*pair)) for pair in pairs])


ways = {
    "window": lambda kept: hw.StreamingWindow(sinks=0, window=kept),
    "4 first tokens and window": lambda kept: hw.StreamingWindow(sinks=4, window=kept - 4),
    "heavy hitters and window": lambda kept: hw.HeavyHitters(heavy=kept // 2, recent=kept // 2),
}
whole = losses()
more = np.array([[losses(way(kept)) - whole for way in ways.values()] for kept in BUDGETS])
more = more[..., max(BUDGETS) // STRETCH :]  # the stretches where every cache is full
told = {
    "tokens": LENGTH,
    "stretches": more.shape[-1],
    "seed": SEED,
    "loss, whole cache": whole[-more.shape[-1] :].mean(),
}
for place, kept in enumerate(BUDGETS):
    for n, way in enumerate(ways):
        told[f"{kept} kept, {way}"] = interval(more[place, n], SEED)
show(told)
shown = xr.DataArray(
    more.mean(-1), {"kept": BUDGETS, "way": list(ways)}, name="loss beyond the whole cache's"
)
keep(told, hw.figure(shown.assign_attrs(unit="nats per token")), model)
