"""Find the strongest attention sink of a prompt, take half of its attention away, and see what the model then says."""

import headwater as hw
from headwater import analyses

PROMPT = "When Mary and John went to the store , John gave a drink to"
model = hw.load("tasks-4l")

record = model.record(PROMPT)
sinks = analyses.find_sinks(record, rule="share")
position = int(sinks["heads"].isel(batch=0).fillna(0).argmax("key"))
print(f"sink rate at the first token: {float(analyses.sink_rate(record)['sink_rate']):.2f}")
print(f"strongest sink: position {position}, {record.strings[0][position]!r}")


def top(logits):
    chances = logits[0, -1].softmax(-1).topk(3)
    words = model.to_strings(chances.indices)
    return ", ".join(f"{word} {p:.3f}" for word, p in zip(words, chances.values.tolist(), strict=True))


print("as it is:     ", top(model(PROMPT)))
with model.edit(hw.Redistribute(keys=[position], keep=0.5, to="others")):
    print("redistributed:", top(model(PROMPT)))
    edited = model.record(PROMPT)
before, after = (float(r.statistic("sink").isel(key=position).mean()) for r in (record, edited))
print(f"mean share of attention at that token: {before:.3f} before, {after:.3f} after")
