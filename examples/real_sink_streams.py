"""Which channel of SmolLM2's stream spikes, where it rises and falls, and which tokens turn into secondary sinks?"""

import numpy as np
import xarray as xr
from _kept import QUICK, interval, keep, passages, show

import headwater as hw
from headwater import analyses

SEED, N, LENGTH = 0, 2 if QUICK else 16, 64
model = hw.load("smollm2-135m")
told: dict[str, object] = {"passages": N, "tokens": LENGTH, "seed": SEED}
record = model.record(passages(model, N, LENGTH, SEED), keep=("qkv", "residual"))
share = (record.statistic("received") / record.statistic("visible")).mean("head")  # [passage, layer, token]

spikes = analyses.activation_spikes(record)
told["largest channel over the median one, by layer"] = spikes.ratio.mean("batch").round().values.tolist()
for name in ("rise", "fall", "plateau", "spike_channel", "spike_position"):
    told[f"spike: {name}"] = sorted(set(spikes[name].values.tolist()))
for layer in (0, 5, 12):
    told[f"channels above 100 medians, layer {layer}"] = interval(spikes.channels.sel(layer=layer), SEED)
    told[f"share of channels near zero, layer {layer}"] = interval(spikes.near_zero.sel(layer=layer), SEED)

for name, band in {"as published": (None, None), "layers 3 to 9": (3, 9)}.items():
    found = analyses.secondary_sinks(record, first_layer=band[0], last_layer=band[1])
    ends = [sorted(set(found[end].values.tolist())) for end in ("first", "last")]
    kinds, count = np.unique(found.kind.values, return_counts=True)
    levels = zip(found.level_created, found.level_lifetime, found.level_count, strict=True)
    second = found.kind.values == "secondary"
    told |= {
        f"{name}: first and last layers": ends,
        f"{name}: kinds": dict(zip(kinds.tolist(), count.tolist(), strict=True)),
        f"{name}: levels (created, lifetime, tokens)": [[int(each) for each in level] for level in levels],
        f"{name}: words": sorted(set(found.token.values[second].tolist())),
    }
    if second.any():
        inside = share.sel(layer=slice(ends[0][0], ends[1][-1])).mean("layer").values
        told[f"{name}: attention to them in those layers"] = interval(inside[second], SEED)

variance = analyses.value_variance(record)
for of in variance.of.values:
    told[f"variance of the first token over that of others, {of}"] = interval(
        variance.gap.sel(of=of).median(["layer", "head"]), SEED
    )
show(told)
size = np.log10(spikes.ratio.mean("batch").values[:-1])
shown = xr.DataArray(
    [size / size.max(), share[..., 0].mean("batch")],
    {
        "line": ["log of the largest channel, 1 at its peak", "attention to the first token"],
        "layer": model.layers,
    },
    ("line", "layer"),
    name="spike and sink",
)
keep(told, hw.figure(shown.assign_attrs(unit="share")), model)
