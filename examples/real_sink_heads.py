"""How many of SmolLM2's heads rest, where does the gradient go, and what do heads do once the sink is set aside?"""

from _kept import QUICK, interval, keep, passages, show

import headwater as hw
from headwater import analyses

SEED, N, LENGTH = 0, 2 if QUICK else 16, 64
ROLES, HIGH = ("previous", "duplicate", "induction", "positional", "broad", "narrow"), 0.9
model = hw.load("smollm2-135m")
told: dict[str, object] = {"passages": N, "tokens": LENGTH, "seed": SEED}
ids = passages(model, N, LENGTH, SEED)
record = model.record(ids, keep=("qkv", "residual"))


def per_passage(values):  # mean and bounds over passages of the mean over all other axes
    return interval(values.mean([dim for dim in values.dims if dim != "batch"]), SEED)


gradient = analyses.gradient_sinks(model, ids, batch_size=4)
for of in gradient.of.values:
    told[f"share of the first token, {of}"] = per_passage(gradient.share.sel(of=of))
told["share of the first token in the gradient, by layer"] = (
    gradient.share.sel(of="mass").mean(["batch", "head"]).round(3).values.tolist()
)
rest = analyses.dormant_heads(record)
told["heads that rest"] = dict(
    zip(rest.rule.values.tolist(), rest.share.values.round(4).tolist(), strict=True)
)

support = analyses.row_support(record)
told["keys for 99 % of a row"] = per_passage(support.support)
told["keys for 99 % of the last row"] = per_passage(support.support.isel(query=-1))
told["share of keys above 0.01"] = per_passage(support.above)
told["heads with less than 4 keys in the mean"] = int((support.mean_support < 4).sum())

settings = {"sequences": 2 if QUICK else 8, "seed": SEED}
plain, aside = (analyses.head_roles(model, sinks=how, **settings) for how in (None, "aside"))
told["weight set aside, mean over heads"] = round(float(aside.aside.mean()), 4)
told[f"heads of which more than {HIGH} is set aside"] = int((aside.aside > HIGH).sum())
for role in ROLES:
    for name, roles in (("with the sink", plain), ("without", aside)):
        score = roles.sel(role=role)
        told[f"{role}, {name}: mean, heads above {HIGH}"] = [
            round(float(score.mean()), 4), int((score > HIGH).sum()),
        ]  # fmt: skip
show(told)
title = "Positional heads, without the sink"
keep(told, hw.figure(aside.sel(role="positional").drop_vars("role"), title=title), model)
