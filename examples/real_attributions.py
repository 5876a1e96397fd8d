"""Which attributions agree with blanking words out on SmolLM2, with the attention sink set aside and not?"""

import re
import time
from pydoc_data.topics import topics  # the reference of Python, as English text

import numpy as np
import xarray as xr
from _kept import QUICK, earlier, keep
from _sink_aside import with_and_without

import headwater as hw
from headwater import analyses as a

SEED, N = 0, 1 if QUICK else 7
rng, model = np.random.default_rng(SEED), hw.load("smollm2-135m")
ps = [e.prompt for kind in ("indirect_object", "capital") for e in hw.prompt_set(kind, N, SEED, model=model)]
prose = re.findall(r"[A-Z][a-z]+(?: [a-z]+){12,20}(?=[ ,.])", " ".join(" ".join(topics.values()).split()))
ps += [str(text) for text in rng.choice(prose, N, replace=False)]  # sentences, cut short
record = model.record(ps)
real, chance = record.valid.numpy(), rng.random(record.valid.shape)
truth, aside = a.blank_out(model, ps).values, a.rollout(record, without="sinks")
others = aside.values[:, 0] > 0
ROWS = {
    "rollout": lambda: a.rollout(record), "rollout without sinks": lambda: aside,
    "flow": lambda: a.flow(record), "flow without sinks": lambda: a.flow(record, without="sinks"),
    "raw attention, last layer": lambda: a.raw_attention(record), "relevance": lambda: a.relevance(model, ps),
    "norms, last layer": lambda: a.norms(model, ps)["norm"].isel(layer=-1),
    "value zeroing, last layer": lambda: a.value_zeroing(model, ps, first_layer=model.layers[-1]),
    "value zeroing, all layers": lambda: a.value_zeroing(model, ps),
    "globenc": lambda: a.globenc(model, ps, normalise=True), "ALTI": lambda: a.alti(model, ps),
    "gradient rollout": lambda: a.gradient_rollout(model, ps),
    "later is larger": lambda: np.where(real, real.cumsum(1), np.nan),  # two controls
    "by chance": lambda: np.where(real, chance, np.nan), "blank-out": lambda: truth,
}  # fmt: skip
RULES = {"gradient × input": "gradient", "RelP": "relp", "RelP, as released": "relp_released", "GIM": "gim"}
for name, rule in (RULES | {"AttnLRP": "attnlrp"}).items():
    ROWS[name] = lambda rule=rule: a.input_x_gradient(model, ps, rule=rule)

told = {"seed": SEED, "prompts": len(ps), "tokens": int(real.sum()), "sinks": int((real & ~others).sum())}
before = earlier(told)
for name in ("rollout", "RelP", "blank-out") if QUICK else ROWS:
    if name not in before:
        begun = time.process_time()
        row = np.asarray(ROWS[name]()).reshape(real.shape)
        before[name] = with_and_without(model, ps, row, truth, real, others, SEED)
        before[name]["seconds"] = round(time.process_time() - begun, 1)
    told[name] = before[name]
    print(f"{name}: {told[name]}", flush=True)
    keep(before | told, None, model)
drawn = xr.DataArray(
    [[told[n][f"agreement{of}"][0] for of in ("", ", others")] for n in ROWS if n in told],
    {"method": [n for n in ROWS if n in told], "tokens": ["all", "without the sink"]}, ("method", "tokens"),
    "Rank correlation with blank-out",
)  # fmt: skip
keep(told, hw.figure(drawn), model)
