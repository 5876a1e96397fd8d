"""What happens to SmolLM2's loss and answers when attention is taken off its sinks: ACT, and the first token cut?"""

import xarray as xr
from _kept import QUICK, interval, keep, passages

import headwater as hw
from headwater import analyses

SEED, KEEPS = 0, [0.0, 0.4]
N, HELD, LENGTH, LAYERS = (2, 2, 12, [20]) if QUICK else (16, 6, 48, None)
model = hw.load("smollm2-135m")
texts = [model.tokenizer.decode(row) for row in passages(model, N + HELD, LENGTH, SEED)]
tasks = {"real text": (texts, None)}
for name in ("indirect_object", "capital", "docstring")[: 1 if QUICK else 3]:
    examples = hw.prompt_set(name, N + HELD, SEED, model=model)
    tasks[name] = ([e.prompt for e in examples], [e.answer for e in examples])
layers = LAYERS or model.layers[2:-1]  # ACT leaves the first two and the last alone
every = [str(hw.Head(layer, head)) for layer in layers for head in range(model.n_heads)]
told, rows = {"examples": N, "held out": HELD, "seed": SEED}, {}


def chances(
    answers, logits, tokens
):  # the log-probability of each answer, and whether it is the first choice
    ids = [model.tokenizer(answer)["input_ids"][0] for answer in answers]
    last = logits[range(len(ids)), tokens.mask.sum(-1) - 1].log_softmax(-1)
    return last[range(len(ids)), ids], last.argmax(-1).eq(last.new_tensor(ids)).double()


for name, (prompts, answers) in tasks.items():
    asked = answers and (lambda *run, a=answers[:HELD]: chances(a, *run)[0])
    kept = [str(h) for h in hw.recipes.calibration_heads(model, prompts[:HELD], asked, layers=layers)]
    judged, right = prompts[HELD:], answers and answers[HELD:]
    same = {"controls": 1, "answer": right, "seed": SEED, "batch_size": N}
    sets = {"all": every, "kept": kept}
    first = analyses.redistribution_study(model, judged, rule=None, keys=0, keep=KEEPS, **same)
    act = analyses.redistribution_study(model, judged, rule="act", keep=[0.4], heads=sets, **same)
    found = {"plain": interval(first.plain.values, SEED), "ACT heads kept": len(kept)}
    found["other sinks of a head"] = float(act.sinks.mean())
    places = [(f"first token × {k}", first.isel(heads=0, keep=n)) for n, k in enumerate(KEEPS)]
    places += [(f"ACT, {heads} heads", act.sel(heads=heads).isel(keep=0)) for heads in sets]
    for what, study in places:
        for treatment in ("sinks", "random_keys", "same_mass"):
            at = study.sel(treatment=treatment)
            found[f"{what}: {treatment}"] = [round(float(at[v]), 4) for v in ("mean", "low", "high")]
        rows.setdefault(what, []).append(float(study["mean"].sel(treatment="sinks")))
    for what, some in {"plain": [], **sets}.items() if answers else ():
        calmed = hw.recipes.attention_calibration(model, some, layers=layers) if some else []
        with model.edit(*calmed):
            tokens = model.to_tokens(judged)
            found[f"first choice, {what}"] = interval(chances(right, model(tokens), tokens)[1], SEED)
    told[name] = found
    print(name, *(f"  {what}: {value}" for what, value in found.items()), sep="\n")
shown = xr.DataArray(
    list(rows.values()), {"edit": list(rows), "task": list(tasks)}, name="effect of the edit"
)
keep(told, hw.figure(shown.assign_attrs(unit="nats; above 0 is better")), model)
