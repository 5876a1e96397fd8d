"""Which heads tell the induction heads of SmolLM2 what came before: do weights and patching agree?"""

from functools import partial

import _kept
import numpy as np
import torch
from _kept import QUICK, keep
from scipy.stats import spearmanr

import headwater as hw
from headwater import analyses

SEED = 0
rng, model = np.random.default_rng(SEED), hw.load("smollm2-135m")
PAIRS, TOKENS, INTO, SEQUENCES = (1, 6, 1, 2) if QUICK else (6, 7, 4, 6)
interval = partial(_kept.interval, seed=rng)  # the mean, and 95 % of the means of resampled values
roles = analyses.head_roles(model, length=50, sequences=SEQUENCES, seed=SEED)
told = {"texts": PAIRS, "sequences": SEQUENCES, "seed": SEED}
for role in ("prefix_matching", "previous"):
    top = roles.sel(role=role).to_series().nlargest(6)
    told[role] = {f"{layer}.{head}": score for (layer, head), score in top.items()}
heads = [hw.Head.parse(name) for name in told["prefix_matching"]][:INTO]
# r, then r again up to its last token but one; where r is spoilt that token stands before another one's answer
r = torch.tensor(np.stack([rng.permutation(np.arange(1000, 20000))[:TOKENS] for _ in range(PAIRS)]))
spoilt = r.clone()
spoilt[:, [-2, 2]] = r[:, [2, -2]]
clean, corrupt = (torch.cat([first, r[:, :-1]], 1) for first in (r, spoilt))
asked = {"answer": r[:, -1].tolist(), "wrong": r[:, 3].tolist()}
weights = analyses.composition(model, to_layers=sorted({head.layer for head in heads})).excess.sel(
    composition="k"
)
rows = []
for head in heads:
    into = analyses.path_patch(model, clean, corrupt, receivers=f"{head}.k", per="query_head", **asked)
    told["logit difference"] = interval(into.clean)
    for sender in (hw.Head.parse(name) for name in into.sender.values.tolist() if name[0].isdigit()):
        overlap = weights.sel(layer=sender.layer, head=sender.head, to_layer=head.layer, to_head=head.head)
        rows.append((f"{sender} → {head}", float(overlap), float(into.sel(sender=str(sender)).mean())))
names, by_weights, by_patching = (np.array(column) for column in zip(*rows, strict=True))
for way, order in (("weights", by_weights), ("patching", by_patching)):
    told[f"pairs by {way}"] = {str(names[n]): rows[n][1:] for n in abs(order).argsort()[:-7:-1]}
picks = rng.integers(len(rows), size=(1000, len(rows)))
size = abs(by_patching)
drawn = [spearmanr(by_weights[pick], size[pick]).statistic for pick in picks]
chance = [spearmanr(by_weights, rng.permutation(size)).statistic for _ in range(1000)]
found = spearmanr(by_weights, size).statistic
told["rank correlation"] = [float(found), *np.quantile(drawn, [0.025, 0.975]).tolist()]
told["rank correlation of permuted pairs, 95 %"] = np.quantile(chance, [0.025, 0.975]).tolist()
keys = [f"{head}.k" for head in heads]
both = analyses.path_patch(model, clean, corrupt, receivers=keys, per="query_head", **asked).mean("batch")
told["into all their keys"] = both.to_series().nlargest(4).to_dict()
for name, value in told.items():
    print(f"{name}: {value}")
keep(told, hw.figure(roles, role="prefix_matching"), model)
