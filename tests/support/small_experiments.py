"""An experiment on the embedded model, whose fields a test changes."""

from typing import Any

import headwater as hw

PROMPT = "When Mary and John went to the store , John gave a drink to"

EDITS = [hw.Redistribute([0], 0.2), hw.ScaleHeads({"1.1": 0.5}), hw.Knockout(slice(-2, None), [1])]


def asked(**more: Any) -> hw.Experiment:
    prompts = [{"text": PROMPT, "answer": "Mary", "wrong": ["John"]}, PROMPT, {"tokens": [1, 20, 30]}]
    return hw.Experiment(**{"model": "tasks-4l", "prompts": prompts[:1], "edits": EDITS} | more)
