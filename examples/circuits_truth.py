"""Do attributions foretell what changing an edge does? Every edge of one prompt changed, and the guesses beside it."""

import headwater as hw
from headwater import analyses

model = hw.load("tasks-4l")
examples = sorted(hw.prompt_set("capital", 20, seed=11), key=lambda e: (len(e.prompt.split()), e.prompt))[:1]
found = analyses.attribution_truth(model, examples, steps=3)

print(examples[0].prompt, "→", examples[0].answer)
print("correlation of guess and effect (gate_slope: of heads, the others: of edges):")
print(found.per_pair[..., 0].to_pandas().T.round(2).to_string(), "\n")
effect = found.effect[:, 0]
guess = found.predicted.sel(of_edge="eap_ig_inputs")[:, 0]
print("edges whose change lowers the logit difference most, and what EAP-IG foretold:")
for n in effect.values.argsort()[::-1][:6]:
    print(f"  {effect.edge.values[n]:18}{float(effect[n]):7.2f}{float(guess[n]):7.2f}")
