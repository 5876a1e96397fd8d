"""When the strongest name mover of SmolLM2 is gone, do later heads take its place, or do others object less?"""

import xarray as xr
from _kept import QUICK, interval, keep, show

import headwater as hw
from headwater import analyses

SEED, N = 2, 4 if QUICK else 40  # not the prompts on which real_indirect_objects.py found the heads
MOVER, CONTROLS = "23.3", ["23.0", "23.4", "23.5"]  # the second mover of its layer, and two others
model, told = hw.load("smollm2-135m"), {"prompts": N, "seed": SEED}
examples = hw.prompt_set("indirect_object", N, seed=SEED, model=model)
texts = [e.prompt for e in examples]
asked = [e.answer for e in examples], [e.wrong[0] for e in examples]


def written(*off):  # logits that each head writes towards the answer and away from the other name
    with model.edit(*off):
        return analyses.direct_logit_attribution(model, texts, *asked, unit="head")


plain = written()
told |= {"right": interval(plain.total > 0, SEED), "difference": interval(plain.total, SEED)}
later = plain.sel(layer=slice(24, None))
rows = {}
for head in (MOVER, *CONTROLS):  # its output is its mean over all tokens
    without = written(hw.AblateHeads(head, "mean", examples=texts))
    change = without.sel(layer=later.layer) - later
    rows[head] = change.mean("batch")
    told[f"difference without {head}, more by"] = interval(without.total - plain.total, SEED)
    told[f"later heads write without {head}, more by"] = interval(change.sum(("layer", "head")), SEED)
    for kind, some in {"for": later.mean("batch") > 0, "against": later.mean("batch") < 0}.items():
        told[f"those that write {kind} the name"] = interval(later.where(some).sum(("layer", "head")), SEED)
        told[f"those that write {kind} the name, without {head}, more by"] = interval(
            change.where(some).sum(("layer", "head")), SEED
        )
    for at in abs(rows[head]).to_series().nlargest(6).index if head == MOVER else ():
        one = dict(zip(("layer", "head"), at, strict=True))
        before, more = (interval(each.sel(one), SEED) for each in (later, change))
        told[f"{at[0]}.{at[1]} before, and more by without {head}"] = [before, more]
show(told)
shown = xr.concat(list(rows.values()), "without").assign_coords(without=list(rows))
shown = shown.rename("change of what it writes").assign_attrs(unit="logits")
keep(told, hw.figure(shown.sel(without=MOVER)), model)
