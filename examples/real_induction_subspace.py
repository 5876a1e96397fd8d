"""In how many directions do SmolLM2's heads compare the token before a key with the query's own, as induction does?"""

import numpy as np
import torch
from _kept import QUICK, keep, show

import headwater as hw

SEED, HALF, COUNT = 0, 12 if QUICK else 40, 2 if QUICK else 8
model = hw.load("smollm2-135m")
drawn = torch.randint(100, 10000, (COUNT, HALF), generator=torch.Generator().manual_seed(SEED))
record = model.record(drawn.repeat(1, 2))
found = hw.analyses.contrastive_qk(record, "previous", unrotated_by=model, seed=SEED)
roles = hw.analyses.head_roles(model, length=HALF, sequences=COUNT, seed=SEED).sel(role="induction")
match = found.score.sel(match=True) - found.score.sel(match=False)
told = {"seed": SEED, "texts": COUNT, "tokens": 2 * HALF, "heads": []}
order = np.argsort(-roles.values.ravel(), kind="stable")
for n in [*order[:5], *order[-3:]]:
    head = {"layer": int(n) // model.n_heads, "head": int(n) % model.n_heads}
    at, parts = found.isel(head), match.isel(head)
    told["heads"].append(
        {
            "head": f"{head['layer']}.{head['head']}",
            "induction": round(float(roles.isel(head)), 3),
            "rank": int(at["rank"]),
            "above chance": int(at.above_chance),
            "largest over shuffled": round(float(at.singular[0] / at.shuffled), 2),
            "score gained by a match": round(float(parts.sum()), 2),
            "of it in the subspace": round(float(parts.sel(part="subspace") / parts.sum()), 2),
        }
    )
both = np.argsort(np.argsort([roles.values.ravel(), match.sum("part").values.ravel()]))
told["rank correlation of induction and score gained"] = round(float(np.corrcoef(both)[0, 1]), 3)
show(told)
keep(told, hw.figure(match.sum("part").assign_attrs(unit="score")), model)
