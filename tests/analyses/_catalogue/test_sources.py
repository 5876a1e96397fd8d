"""What an analysis is given is refused in one line where it is of another kind than the analysis reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import headwater as hw
from headwater.analyses._catalogue.catalogue import catalogue
from headwater.lens.errors import AnalysisError

PROMPT = "Mary gave John a drink"
ENTRIES = catalogue()


@pytest.fixture(scope="module")
def model() -> hw.HookedModel:
    return hw.load("tasks-4l")


def test_every_analysis_refuses_every_other_kind_of_source(model: hw.HookedModel) -> None:
    record = model.record(PROMPT)
    for name, entry in ENTRIES.items():
        wrong: list[Any] = [
            None,
            PROMPT,
            model.hf,
            3,
            Path("record"),
            model if entry.inputs == "record" else record,
        ]
        for given in wrong if entry.inputs != "circuits" else []:
            with pytest.raises(AnalysisError, match=f"^{name} takes a (record|model); got [^\n]+$"):
                entry.function(given)


def test_the_mend_is_said(model: hw.HookedModel) -> None:
    record = model.record(PROMPT)
    for call, mend in (
        (
            lambda: hw.analyses.rollout(model),
            r"give model.record\(prompt\), as in rollout\(model.record\(prompt\)\)",
        ),
        (lambda: hw.analyses.rollout("a.safetensors"), r"give hw.Record.open\('a.safetensors'\)"),
        (
            lambda: hw.analyses.rollout(model.generate(PROMPT, 1, record=True)),
            "output, record = model.generate",
        ),
        (lambda: hw.analyses.alti(record), r"alti\(model, …\)"),
        (lambda: hw.analyses.alti(model.hf), r"give hw.load\(model\)"),
    ):
        with pytest.raises(AnalysisError, match=mend):
            call()


def test_a_model_or_a_record_where_texts_are_wanted(model: hw.HookedModel) -> None:
    for name, entry in ENTRIES.items():
        if entry.inputs not in ("model+examples", "model+pairs") or name.startswith("circuit_"):
            continue  # these take a graph first
        for given, said in ((model, "a model"), (model.record(PROMPT), "a record"), (None, "None")):
            with pytest.raises(AnalysisError, match=f"^{name} takes [^\n]+; got {said}$"):
                entry.function(model, given)


def test_what_is_missing_is_named(model: hw.HookedModel) -> None:
    for name, entry in ENTRIES.items():
        if entry.inputs in ("model+examples", "model+pairs"):
            with pytest.raises(AnalysisError, match=f"^{name} also needs (examples|pairs|clean|graph)"):
                entry.function(model)
