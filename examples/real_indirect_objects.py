"""Which heads of SmolLM2 name the indirect object, through what, and which speak against it?"""

from functools import partial

import _kept
import numpy as np
from _kept import QUICK, keep

import headwater as hw
from headwater import analyses

SEED = 0
rng, model = np.random.default_rng(SEED), hw.load("smollm2-135m")
examples = hw.prompt_set("indirect_object", 4 if QUICK else 40, seed=SEED, model=model)
texts = [e.prompt for e in examples]
pairs = examples[: len(examples) // 2]  # those that are patched; a corrupt prompt swaps who gives
interval = partial(_kept.interval, seed=rng)  # the mean, and 95 % of the means of resampled prompts


def strongest(effect, count, sign=0):  # heads by their mean effect: the largest of all, or of one sign
    mean = {str(s): float(effect.sel(sender=s).mean()) for s in effect.sender.values if str(s)[0].isdigit()}
    found = sorted(mean, key=lambda head: -(sign * mean[head] if sign else abs(mean[head])))[:count]
    return {head: interval(effect.sel(sender=head)) for head in found}


def through(heads, kind):  # by way of what these heads read as queries, keys or values
    names, some = [f"{head}.{kind}" for head in heads], pairs[: len(pairs) // 2]
    return strongest(analyses.path_patch(model, some, receivers=names, per="query_head"), 5)


def written(*off):  # logits that each head writes towards the answer and away from the other name
    asked = [e.answer for e in examples], [e.wrong[0] for e in examples]
    with model.edit(*off):
        return analyses.direct_logit_attribution(model, texts, *asked, unit="head")


plain = written()
told = {"prompts": len(examples), "patched": len(pairs), "seed": SEED}
told["right"], told["difference"] = interval(plain.total > 0), interval(plain.total)
patched = analyses.patch(model, pairs, how="noise", layers=[17, 23] if QUICK else "all")
sides = [abs(patched[n::2]).mean("batch").values.ravel().argsort()[-10:] for n in (0, 1)]
told["in the top 10 of both halves"] = len(set(sides[0]) & set(sides[1]))
by_head = patched.mean("batch").to_series()
told["by patching"] = {f"{at[0]}.{at[1]}": float(by_head[at]) for at in by_head.abs().nlargest(8).index}
direct = analyses.path_patch(model, pairs)  # to the logits, with MLPs recomputed
told["movers"], told["negative movers"] = strongest(direct, 5, 1), strongest(direct, 5, -1)
movers = list(told["movers"])[:3]
told |= {f"through the movers' {kind}": through(movers, kind) for kind in ("q" if QUICK else "qkv")}
told["through the values of those"] = through(list(told["through the movers' q"])[:3], "v")
for head in (movers[0], "23.4", "23.5", "23.6"):  # its output is its mean; the last three are controls
    change = written(hw.AblateHeads(head, "mean", examples=texts)) - plain
    later = change.where(change.layer > 23).sum(("layer", "head"))
    told[f"later heads write without {head}"] = interval(later)
for name, value in told.items():
    print(f"{name}: {value}")
keep(told, hw.figure(patched.mean("batch")), model)
