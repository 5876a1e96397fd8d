"""Which attributions agree with blanking words out on SmolLM2, with the attention sink set aside and not?"""

import json
import re
import sys
from datetime import date
from pathlib import Path
from pydoc_data.topics import topics  # the reference of Python, as English text

import numpy as np

import headwater as hw
from headwater import analyses

SEED, QUICK = 0, "--quick" in sys.argv
N, rng, model = 1 if QUICK else 7, np.random.default_rng(SEED), hw.load("smollm2-135m")
KINDS = ["indirect_object", "capital"]
prompts = [e.prompt for kind in KINDS for e in hw.prompt_set(kind, N, SEED, model=model)]
prose = re.findall(r"[A-Z][a-z]+(?: [a-z]+){12,20}(?=[ ,.])", " ".join(" ".join(topics.values()).split()))
prompts += [str(text) for text in rng.choice(prose, N, replace=False)]  # sentences, cut short

record, at_last = model.record(prompts), {"first_layer": model.layers[-1]}
found = {
    "rollout": analyses.rollout(record),
    "rollout without sinks": analyses.rollout(record, without="sinks"),
}
if not QUICK:
    found |= {
        "flow": analyses.flow(record),
        "flow without sinks": analyses.flow(record, without="sinks"),
        "raw attention, last layer": analyses.raw_attention(record),
        "relevance": analyses.relevance(model, prompts),
        "norms, last layer": analyses.norms(model, prompts)["norm"].isel(layer=-1),
        "value zeroing, last layer": analyses.value_zeroing(model, prompts, **at_last),
        "value zeroing, all layers": analyses.value_zeroing(model, prompts),
        "globenc": analyses.globenc(model, prompts, normalise=True),
        "ALTI": analyses.alti(model, prompts),
        "gradient rollout": analyses.gradient_rollout(model, prompts),
    }
rows, real = {name: array.values[:, 0] for name, array in found.items()}, record.valid.numpy()
rows["later is larger"] = np.where(real, real.cumsum(1), np.nan)  # two controls
rows["by chance"] = np.where(real, rng.random(real.shape), np.nan)
rows["blank-out"] = analyses.blank_out(model, prompts).values
alike = analyses.agreement(model, prompts, rows, by="spearman", seed=SEED).sel(other="blank-out")
judged = analyses.faithfulness(model, prompts, rows, steps=1, seed=SEED)
told = {"prompts": len(prompts), "tokens": int(real.sum()), "seed": SEED, "date": str(date.today())}
told |= {k: alike.attrs[k] for k in ("model", "revision", "headwater", "torch", "transformers", "machine")}
columns = {"agreement": alike, "drop": judged.sel(score="comprehensiveness")}
for name, row in rows.items():
    first = row[np.arange(len(row)), real.argmax(1)] / np.nansum(row, 1)
    told[name] = {"first token": round(float(first.mean()), 4)}
    for what, each in columns.items():  # the mean, and 95 % of the means of redrawn prompts
        told[name][what] = [round(float(each[k].sel(attribution=name)), 3) for k in ("mean", "low", "high")]
for name, value in told.items():
    print(f"{name}: {value}")
if len(sys.argv) > 1 and not sys.argv[1].startswith("-"):
    Path(sys.argv[1], "real_attributions.json").write_text(json.dumps(told, indent=1) + "\n", "utf-8")
    drawn = hw.figure(alike["mean"], title="Rank correlation with blank-out")
    drawn.write_image(Path(sys.argv[1], "real_attributions.svg"))
