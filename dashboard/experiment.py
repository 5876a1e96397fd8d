"""An edited run as something to take away: Python that repeats it, and JSON with what it showed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from headwater.dashboard.runs import Run, edits_of, next_tokens, resident, source


def as_python(model: str, prompt: str, edits: Sequence[dict]) -> str:
    lines = "".join(f"    {edit.to_python()},\n" for edit in edits_of(edits))
    return (
        f"import headwater as hw\n\nmodel = hw.load({source(model)!r})\nprompt = {prompt!r}\n"
        f"edits = [\n{lines}]\n"
        "before = model.record(prompt)\n"
        "with model.edit(*edits):\n    after = model.record(prompt)\n    logits = model(prompt)\n"
    )


def as_data(model: str, prompt: str, edits: Sequence[dict], before: Run, after: Run) -> dict[str, Any]:
    data: dict[str, Any] = {
        "model": model,
        "revision": resident(model).revision,
        "prompt": prompt,
        "edits": list(edits),
        "provenance": before.record.provenance,
    }
    if before.predicts:
        data["loss"] = {"before": before.loss, "after": after.loss}
        data["next_tokens"] = next_tokens(model, before, after)
    return data
