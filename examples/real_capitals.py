"""Which heads of SmolLM2 bring a capital from its country, and what do MLPs make of what they write?"""

from functools import partial

import _kept
import numpy as np
from _kept import QUICK, keep

import headwater as hw
from headwater import analyses

SEED = 0
rng, model = np.random.default_rng(SEED), hw.load("smollm2-135m")
given = hw.prompt_set("capital", 24 if QUICK else 160, seed=SEED, model=model)
examples = list({e.prompt: e for e in given}.values())
texts, answers = [e.prompt for e in examples], [e.answer for e in examples]
wrong = [e.wrong[0] for e in examples]
interval = partial(_kept.interval, seed=rng)  # the mean, and 95 % of the means of resampled texts


def country(example):  # the positions that the prompt of another country does not share, from either end
    one, other = (model.to_tokens(text)[0].tolist() for text in (example.prompt, example.corrupt))
    first = next(n for n, token in enumerate(one) if token != other[n])
    last = next(n for n, token in enumerate(reversed(one)) if token != other[-1 - n])
    return slice(first, len(one) - last)


told = {"texts": len(texts), "answers": len(set(answers)), "seed": SEED}
for layer in [29] if QUICK else [23, 24, 29]:  # the half that judges a fit has other answers
    fit = {"layer": layer, "heads": "layer", "apart": "answer", "seed": SEED}
    found = analyses.factual_recall(model, texts, answers, wrong, **fit)
    r_squared = [*found.r_squared.values.tolist(), float(found.shuffled_r_squared.max())]
    told[f"MLP {layer}: R² fitted, held out, largest of shuffled"] = r_squared
    told[f"MLP {layer}: weights"] = dict(
        zip(found.term.values.tolist(), found.verdict.values.tolist(), strict=True)
    )
    for part in ("intercept", "error"):
        at = found.sel(part=part, measure="ic-iw")
        bounds = [float(at[f"part_{name}"]) for name in ("mean", "low", "high")]
        told[f"MLP {layer}: {part}, logits"] = bounds
told["logit difference"], told["right"] = interval(found.total[:, 1]), interval(found.total[:, 1] > 0)
shares = found.head_share.sel(measure="ic-iw")
top = abs(shares.mean("batch")).to_series().nlargest(8).index
some = slice(4 if QUICK else 24)
source = analyses.direct_logit_attribution(model, texts[some], answers[some], wrong[some], unit="source")
for at in top:
    rows = source.sel(layer=at[0], head=at[1])
    brought = [float(row[country(e)].sum()) for row, e in zip(rows, examples[some], strict=True)]
    told[f"{at[0]}.{at[1]}, logits"] = interval(shares.sel(layer=at[0], head=at[1]))
    told[f"{at[0]}.{at[1]}, from the country"] = interval(brought)
for name, value in told.items():
    print(f"{name}: {value}")
keep(told, hw.figure(shares.mean("batch")), model)
