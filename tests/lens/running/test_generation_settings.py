"""Settings of generation that make no sense are one line, whether the caller or the model's folder has them.

Seen to fail on the code that gave them to transformers as they were.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_models

import headwater as hw
from headwater.lens.errors import HeadwaterError, PromptError

IDS = tiny_models.batch(1, (5,))[0]
WRONG: list[dict[str, Any]] = [
    {"do_sample": True, "top_k": "x"},
    {"eos_token_id": [1.5]},
    {"repetition_penalty": [2]},
    {"penalty_alpha": 0.6, "top_k": 4, "do_sample": False},  # code of a hub
    {"num_beams": 10**9},
    {"num_return_sequences": 10**9, "do_sample": True},
    {"num_beams": "many"},
    {"eos_token_id": "end"},
    {"forced_eos_token_id": [None]},
]


@pytest.mark.parametrize("settings", WRONG, ids=str)
@pytest.mark.parametrize("place", ["call", "folder"])
def test_settings_that_make_no_sense_are_one_line(
    settings: dict[str, Any], place: str, tmp_path: Path
) -> None:
    model = tiny_models.tiny("gpt2")
    model.save_pretrained(tmp_path)
    if place == "folder":
        file = tmp_path / "generation_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    with pytest.raises(HeadwaterError) as caught:
        hw.load(tmp_path).generate(IDS, 2, **(settings if place == "call" else {}))
    assert "\n" not in str(caught.value)


def test_what_a_call_alone_can_ask_for_is_one_line() -> None:
    """A folder does not turn sampling on."""
    with pytest.raises(PromptError, match=r"with these settings: ValueError: .*temperature"):
        hw.load(tiny_models.tiny("gpt2")).generate(IDS, 2, do_sample=True, temperature=-1.0)


def test_a_fault_of_the_callers_own_function_stays_what_it_is() -> None:
    def tell(_: object) -> None:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        hw.load(tiny_models.tiny("gpt2")).generate(IDS, 2, on_token=tell)


def test_memory_is_asked_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    model = hw.load(tiny_models.tiny("gpt2"))
    monkeypatch.setattr("headwater.lens.running.generation_settings.free_memory", lambda: 10**4)
    model.generate(IDS, 1)
    with pytest.raises(PromptError, match="num_beams=64 follows so many texts that their scores take"):
        model.generate(IDS, 1, num_beams=64)
