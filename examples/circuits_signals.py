"""Which earlier heads made a head look where it looks: signals traced through the weights, and then taken out."""

import headwater as hw
from headwater import analyses

model = hw.load("tasks-4l")
examples = hw.prompt_set("indirect_object", 4)
prompts = [example.prompt for example in examples]


def word(prompt: int, position: int) -> str:
    """Names of positions that fit every prompt: which name stands there, or the end."""
    tokens = model.to_strings(model.to_tokens(prompts[prompt]).ids[0])
    known = {examples[prompt].answer: "answer", examples[prompt].wrong[0]: "subject"}
    return "end" if position == len(tokens) - 1 else known.get(tokens[position].strip(), "elsewhere")


graph = analyses.trace_signals(model, prompts, names=word)
edges = [edge for edge in graph.edges(data=True) if edge[2]["kind"] == "edge"]
print(f"{len(graph)} nodes, {len(edges)} edges; the strongest:")
for sender, reader, about in sorted(edges, key=lambda e: -e[2]["count"] * e[2]["weight"])[:8]:
    print(f"  {sender:16} → {reader:18} {about['weight']:7.2f} in {about['count']} of {len(prompts)} prompts")

found = analyses.signal_interventions(
    model, prompts, answer=[e.answer for e in examples], wrong=[e.wrong[0] for e in examples]
)
print(f"\nwithout the signal of {found.attrs['sender']} to {found.attrs['reader']}:")
print(f"  its score changes by {float(found.score_change.mean()):.2f}", end="")
print(f" (random slices: {float(found.score_change_random.mean()):.2f})")
print(f"  the logit difference by {float(found.change.mean()):.2f}", end="")
print(f" (random slices: {float(found.change_random.mean()):.2f})")
