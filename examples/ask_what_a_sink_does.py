"""Is the first token a sink, does it stay without a text, what does it carry, and what if heads look elsewhere?"""

import headwater as hw
from headwater import analyses

model = hw.load("tasks-4l")
examples = hw.prompt_set("indirect_object", n=5)
prompts, answers = [e.prompt for e in examples], [e.answer for e in examples]

inputs = analyses.sink_inputs(model, prompts, length=16)
print("fraction of heads for which the first token is a sink, with a 95 % interval over prompts:")
for name in inputs.input.values:
    mean, low, high = (float(inputs[part].sel(input=name)) for part in ("mean", "low", "high"))
    print(f"  {name:<10}{mean:.2f}  ({low:.2f} to {high:.2f})")

record = model.record(prompts, keep=("qkv", "residual"))
value = analyses.sink_norms(record).value.mean(("batch", "layer", "head"))
print(f"length of its values: {float(value[0]):.2f}, of other tokens' {float(value[1]):.2f}")

carried = analyses.sink_contribution(model, prompts)["mean"].sel(measure="kl")
print(
    f"prediction without its values: KL {float(carried[0]):.3f} nats, without another's {float(carried[1]):.3f}"
)

study = analyses.redistribution_study(model, prompts, answer=answers, keep=[0.0, 0.5], controls=1)
print("change of the answer's log-probability when its attention is handed on (and beyond random keys):")
for keep in study.keep.values:
    at = study.sel(heads="all", keep=keep)
    low, high = at.beyond.sel(control="random_keys", bound=["low", "high"]).values
    effect = float(at["mean"].sel(treatment="sinks"))
    print(f"  keep {keep:.1f}: {effect:+.3f}  (interval of the difference {low:+.3f} to {high:+.3f})")
