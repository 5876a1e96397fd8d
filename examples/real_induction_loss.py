"""What does SmolLM2 lose on a repeated text without its induction heads, and without the head that feeds them?"""

from functools import partial

import _kept
import numpy as np
import torch
import xarray as xr
from _kept import QUICK, keep

import headwater as hw
from headwater import analyses

SEED = 0
rng, model = np.random.default_rng(SEED), hw.load("smollm2-135m")
SEQUENCES, CONTROLS = (2, 1) if QUICK else (8, 8)
text = torch.tensor(rng.integers(1000, 20000, (SEQUENCES, 50))).repeat(1, 2)


def losses(off):  # nats per token of each text, in both copies, where the output of heads is its mean
    with model.edit(hw.AblateHeads(off, "mean", examples=text)):
        each = torch.nn.functional.cross_entropy(model(text)[:, :-1].mT, text[:, 1:], reduction="none")
    return torch.stack([each[:, :49].mean(1), each[:, 50:].mean(1)]).numpy()


interval = partial(_kept.interval, seed=rng)  # the mean, and 95 % of the means of resampled texts or controls
roles = analyses.head_roles(model, length=50, sequences=2, seed=SEED + 1)  # on other texts
ranked = {
    role: roles.sel(role=role).to_series().nlargest(6).index for role in ("prefix_matching", "previous")
}
sets = {"induction heads": ranked["prefix_matching"], "previous-token heads": ranked["previous"]}
sets |= {"16.0": [(16, 0)]}  # the one that real_induction.py finds
plain, told = losses([]), {"texts": SEQUENCES, "controls": CONTROLS, "seed": SEED}
rows = {"whole model": plain.mean(1)}
for name, heads in sets.items():
    told[name] = [f"{layer}.{head}" for layer, head in heads]
    layers = sorted({layer for layer, _ in heads})
    rest = [(layer, head) for layer in layers for head in range(9) if (layer, head) not in heads]
    off = [told[name]]
    for _ in range(CONTROLS):  # as many other heads of the same layers
        off.append([f"{layer}.{head}" for layer, head in rng.permutation(rest)[: len(heads)].tolist()])
    more = np.stack([losses(some) for some in off]) - plain  # [set, copy, text]
    rows |= {
        f"without {name}": plain.mean(1) + more[0].mean(1),
        f"without others like {name}": plain.mean(1) + more[1:].mean((0, 2)),
    }
    for n, copy in enumerate(("first", "second")):
        told[f"loss of the {copy} copy without {name}, more by"] = interval(more[0, n])
        told[f"loss of the {copy} copy without others like {name}, more by"] = interval(more[1:, n].mean(1))
told |= {f"loss of the {copy} copy": interval(plain[n]) for n, copy in enumerate(("first", "second"))}
for name, value in told.items():
    print(f"{name}: {value}")
axes = {"heads": list(rows), "copy": ["first", "second"]}
loss = xr.DataArray(list(rows.values()), axes, ("heads", "copy"), "loss", {"unit": "nats per token"})
keep(told, hw.figure(loss), model)
