"""Which parts of the last layer of SmolLM2 speak against what it is about to say, and what if they spoke less?"""

from _kept import QUICK, keep

import headwater as hw
from headwater import analyses

SEED = 0
model = hw.load("smollm2-135m")
examples = hw.prompt_set("capital", 60 if QUICK else 200, seed=SEED, model=model)
texts, answers = [e.prompt for e in examples], [e.answer for e in examples]
factors = (0.5,) if QUICK else (0.0, 0.5)
found = analyses.suppressors(model, texts, answers, factors=factors, controls=1 if QUICK else 3, seed=SEED)
told = {"texts": found.attrs["texts"], "judged on": len(found.judged), "seed": SEED}
told["accuracy before"] = float(found.base.sel(measure="accuracy").mean())
for name in found.component.values[found.suppressor].tolist():
    told[f"{name}, logits"] = [
        float(found[k].sel(component=name)) for k in ("mean", "low", "high", "p_corrected")
    ]
for name in found.scaled.values.tolist():
    for measure in ("accuracy", "loss"):
        for factor in factors:
            at = found.sel(scaled=name, measure=measure, factor=factor)
            bounds = [float(at[k]) for k in ("change", "change_low", "change_high")]
            told[f"{measure} with {name} times {factor}, more by"] = bounds
    told[f"{name} is"] = str(analyses.mitigation(found, name, factors[-1]))
for name, value in told.items():
    print(f"{name}: {value}")
keep(told, hw.figure(found["mean"]), model)
