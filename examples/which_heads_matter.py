"""Which heads does the model need, how sure is that, and which of them do the same thing?"""

import headwater as hw
from headwater import analyses

model = hw.load("tasks-4l")
examples = hw.prompt_set("indirect_object", n=24)
texts = [e.prompt + " " + e.answer for e in examples]

tested = analyses.head_significance(model, texts, level=0.01)
print("heads whose removal changes the loss (nats, 95 % interval, p after Holm's correction):")
for layer, head in zip(*tested.significant.values.nonzero(), strict=True):
    at = tested.isel(layer=layer, head=head)
    low, high, p = float(at.low), float(at.high), float(at.p_corrected)
    print(f"  {layer}.{head}  {float(at.effect):+.3f}  ({low:+.3f} to {high:+.3f})  p = {p:.4f}")

pruned = analyses.prune_heads(model, texts, step=0.25, importance="ablation", normalise=None, speed=True)
print("\nleast important heads removed, loss, loss in a random order, speed:")
for n, fraction in enumerate(pruned.fraction.values):
    at = pruned.isel(fraction=n)
    print(
        f"  {fraction:4.0%}  {float(at['measure']):.3f}  {float(at.random.mean()):.3f}  {float(at.speed):.2f}x"
    )

kinds = analyses.head_clusters(model.record(texts), clusters=3)
print("\nkinds of patterns, the head in the middle of each:")
for n, middle in enumerate(kinds.prototype.values):
    members = [str(m) for m in kinds.member.values[kinds.cluster.values.ravel() == n]]
    print(f"  like {middle}: {', '.join(members)}")

dims = ("composition", "layer", "head", "to_layer", "to_head")
excess = analyses.composition(model).excess.stack(pair=dims).dropna("pair")
kind, layer, head, to_layer, to_head = excess["pair"].values[excess.values.argmax()]
print(f"\nstrongest composition beyond chance: {layer}.{head} into {to_layer}.{to_head} by its {kind}")
