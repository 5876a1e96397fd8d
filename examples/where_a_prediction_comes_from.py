"""Which words a prediction draws from, by seven methods: attention, attention with its gradient, norms, and changes."""

import pandas as pd

import headwater as hw
from headwater import analyses

PROMPT = "When Mary and John went to the store , John gave a drink to"
model = hw.load("tasks-4l")
record = model.record(PROMPT)

found = {
    "raw": analyses.raw_attention(record),
    "rollout": analyses.rollout(record),
    "flow": analyses.flow(record),
    "globenc": analyses.globenc(model, PROMPT, normalise=True),
    "alti": analyses.alti(model, PROMPT),
    "relevance": analyses.relevance(model, PROMPT, answer="Mary", wrong="John"),
    "blank out": analyses.blank_out(model, PROMPT, answer="Mary", wrong="John"),
}
rows = {name: result.values.reshape(-1) for name, result in found.items()}
table = pd.DataFrame(rows, index=pd.Index(record.strings[0], name="word"))
print((table / table.sum()).round(3).to_string())  # shares, so that columns can be read side by side
