"""Which heads write a capital, what an MLP makes of their outputs, and whether the last layer speaks against it."""

import headwater as hw
from headwater import analyses

model = hw.load("tasks-4l")
examples = hw.prompt_set("capital", n=300, seed=0)
texts, answers = [e.prompt for e in examples], [e.answer for e in examples]

found = analyses.factual_recall(
    model, texts, answers, [e.wrong[0] for e in examples], layer=3, heads="layer", apart="answer"
)
print(f"logit less the mean of all: {float(found.total[:, 0].mean()):.1f}, of it from heads:")
heads = found.head_mean.sel(measure="ic").stack(at=("layer", "head"))
for place in abs(heads).argsort().values[::-1][:4]:
    layer, head = heads["at"].values[place]
    low, high = (
        float(found[name].sel(layer=layer, head=head, measure="ic")) for name in ("head_low", "head_high")
    )
    print(f"  {layer}.{head}  {float(heads[place]):+.2f}  ({low:+.2f} to {high:+.2f})")

fitted, held_out = found.r_squared.values
print(f"MLP 3 as a sum of its layer's heads: R² {fitted:.2f}, on other answers {held_out:.2f}")
for name in found.term.values:
    at = found.sel(term=name)
    print(
        f"  {name:8}  {float(at.weight):+.2f}  ({float(at.weight_low):+.2f} to {float(at.weight_high):+.2f})"
    )
for part in ("residual", "intercept", "error"):
    print(f"  {part}: {float(found.part_mean.sel(part=part, measure='ic')):+.2f} logits")

against = analyses.suppressors(model, texts, answers, factors=(0.0, 0.5))
print("suppressors in the last layer:", ", ".join(against.component.values[against.suppressor]) or "none")
for name in against.scaled.values:
    for change in against.change.sel(scaled=name, measure="loss"):
        print(f"  {name} times {float(change.factor):.1f}: loss {float(change):+.4f}")
    print("  as an edit:", *(edit.to_python() for edit in analyses.mitigation(against, name, 0.5)))
