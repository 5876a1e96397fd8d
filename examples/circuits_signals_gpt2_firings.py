"""How often heads of GPT-2 small fire on indirect objects and on ordinary text, beside the published counts.

Franco & Crovella 2024 took 256 prompts and, as a control, 256 documents cut to 21 tokens. Name a file of ordinary
texts, one on each line, behind the model for the control.
"""

import json
import sys
from pathlib import Path

import headwater as hw
from headwater import analyses

PUBLISHED = {"4.11": (3821, 3812), "4.3": (716, None), "1.0": (669, None), "2.8": (527, None), "8.6": (517, 85),
             "9.9": (305, 16), "9.6": (257, 7), "5.5": (254, None), "3.0": (242, 54), "10.0": (110, 48)}  # fmt: skip
DIFFERENCES = (1.348, 4.029, 4.013, 3.566, 4.977)
try:
    model = hw.load(sys.argv[1] if len(sys.argv) > 1 else "gpt2")
except hw.HeadwaterError as error:
    sys.exit(print(f"not run here: {error}"))
examples = hw.prompt_set("indirect_object", 256)
prompts = [e.prompt.replace(" ,", ",").replace(" .", ".") for e in examples]
lines = Path(sys.argv[2]).read_text(encoding="utf-8").splitlines() if len(sys.argv) > 2 else []
control = [line for line in lines if line.strip()][:256] or None
graph = analyses.trace_signals(model, prompts, roots="10.0", constant=True, control=control)
fired = json.loads(graph.graph["firings"])
beside = json.loads(graph.graph.get("control_firings", "{}"))
count = int(model.to_tokens(prompts).mask.sum())
print(f"{count} tokens in {len(prompts)} prompts, {graph.graph.get('control_texts', 0)} ordinary texts")
for head, (published, in_text) in PUBLISHED.items():
    print(f"{head:5}{fired.get(head, 0):5} ({published}); ordinary text {beside.get(head, '-')} ({in_text})")
words = [(e.answer, e.wrong[0]) for e in examples[:5]]
for prompt, names, published in zip(prompts, words, DIFFERENCES, strict=False):
    io, s = (model(prompt)[0, -1, model.tokenizer(" " + name).input_ids[-1]].item() for name in names)
    print(f"logit of {names[0]} over {names[1]}: {io - s:.3f}; one of theirs {published}")
