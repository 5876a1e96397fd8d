"""Do the sinks of SmolLM2 come and go with its massive activation, and do they stay without it?"""

import numpy as np
import torch
import xarray as xr
from _kept import QUICK, interval, keep, passages, show

import headwater as hw

SEED, N, LENGTH = 0, 2 if QUICK else 16, 64
CHANNEL = 507  # the largest one of the first token, as real_sinks.py finds it
BANDS = {"3 to 9": slice(3, 10), "12 to 29": slice(12, 30)}  # between the MLPs that write it and erase it
CUTS = {  # what MLPs write at the first token: this channel of it, all of it, and all of it in controls
    f"channel {CHANNEL} of MLPs 1, 2": ((1, 2), [CHANNEL]), f"channel {CHANNEL} of MLP 11": ((11,), [CHANNEL]),
    "MLPs 1, 2": ((1, 2), slice(None)), "MLP 11": ((11,), slice(None)),
    "MLPs 5, 6": ((5, 6), slice(None)), "MLP 13": ((13,), slice(None)),
}  # fmt: skip
model, told = hw.load("smollm2-135m"), {"passages": N, "tokens": LENGTH, "seed": SEED}
ids, blocks = passages(model, N, LENGTH, SEED), model.hf.model.layers


def run(layers=(), channels=()):  # shares and streams, where these MLPs leave these channels alone
    def cut(module, given, out):
        out[:, 0, channels] = 0.0
        return out

    hooks = [blocks[layer].mlp.register_forward_hook(cut) for layer in layers]
    record = model.record(ids, statistics=("received", "visible"), keep=("residual",))
    for hook in hooks:
        hook.remove()
    share = (record.statistic("received") / record.statistic("visible")).mean("head").values
    return share, torch.stack([record.residual(layer) for layer in record.layers], 1).numpy()


share, stream = run()  # [passage, layer, token], [passage, layer, token, channel]
size, median = stream[..., CHANNEL], np.median(abs(stream), axis=(2, 3))
told["channel of the first token, by layer"] = size[:, :, 0].mean(0).round().tolist()
told["over the median, by layer"] = (size[:, :, 0] / median).mean(0).round().tolist()
told["share of the first token, by layer"] = share[:, :, 0].mean(0).astype(float).round(2).tolist()
others = size[:, 5, 1:] > 300  # tokens that have it as well, in layers 3 to 9
told["other tokens with it"] = int(others.sum())
told["which"] = sorted({model.tokenizer.decode(token) for token in ids[:, 1:].numpy()[others]})
for name, band in BANDS.items():
    told[f"share of those, layers {name}"] = interval(share[:, band, 1:].mean(1)[others], SEED)
rows = {"plain": share}
for what, (layers, channels) in CUTS.items():
    rows[f"without {what}"], left = run(layers, channels)
    largest = abs(left[:, :, 0]).max(-1) / np.median(abs(left), axis=(2, 3))
    told[f"largest over the median, layers 5 and 12, without {what}"] = largest[:, [5, 12]].mean(0).tolist()
for what, each in rows.items():
    for name, band in BANDS.items():
        told[f"share of the first token, layers {name}, {what}"] = interval(each[:, band, 0].mean(1), SEED)
show(told)
lines = {"run": list(rows), "layer": model.layers}
shown = xr.DataArray(
    [each[:, :, 0].mean(0) for each in rows.values()], lines, name="weight on the first token"
)
keep(told, hw.figure(shown.assign_attrs(unit="mean share")), model)
