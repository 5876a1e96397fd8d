"""A view as an experiment: a file that runs wherever the model is, with the results that it had here beside it.

The two files go into one archive with the picture. `headwater experiment experiment.json` runs it again and says
whether the numbers agree with those of the page.
"""

from __future__ import annotations

import hashlib
import io
import math
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import headwater as hw
from headwater.dashboard.running import inputs, models, runs
from headwater.dashboard.running.measure import Measure
from headwater.dashboard.running.models import resident
from headwater.dashboard.running.runs import Run, edits_of
from headwater.dashboard.state import workspace
from headwater.dashboard.state.state import State
from headwater.lens.errors import ExperimentError
from headwater.lens.experiments.measures import ATTENTION, LONGEST_MAP, named
from headwater.lens.experiments.results import Results

NAMES = {"difference": "logit_difference", "log_probability": "probability", "probability": "probability",
         "loss": "loss", "match": "loss", "likeness": "similarity"}  # fmt: skip
FILE, RESULTS, PICTURE = "experiment.json", "experiment.results.json", "picture.png"


def as_experiment(state: State, chosen: Measure) -> hw.Experiment:
    """Runs A and B as an experiment. ExperimentError for what the format can not hold.

    A folder of the user's own is named by its whole path, so that no hub is ever asked for a private model's name.
    """
    if state.b_model is not None:
        raise ExperimentError("an experiment is of one model; save run A and the other model as two")
    plain = chosen.plain
    model = resident(state.model)
    # an experiment's edits act on its own part where they name none
    edits = [
        edit | ({"part": edit.get("part") or model.part_name} if state.part else {})
        for edit in state.applied()
    ]
    measures = [NAMES[chosen.kind]]
    if plain.logits.size:
        measures.append("class" if plain.labels else "next_token")
    if max(len(plain.queries), len(plain.keys)) <= LONGEST_MAP:
        measures.append(f"{ATTENTION}{state.layer}.{state.head}")
    prompt: dict[str, Any] = {}
    what = inputs.given(state, model)
    text, picture, decoder = what.key
    if picture:
        prompt["image"] = {"file": PICTURE, "sha256": _sha256(picture_bytes(state))}
    prompt |= {"text": text} if text else {}
    prompt |= {"decoder": decoder} if decoder else {}
    if chosen.answer is not None:
        prompt |= {"answer": _named(plain, chosen.answer)}
        if chosen.kind == "difference" and chosen.wrong is not None:
            prompt |= {"wrong": [_named(plain, chosen.wrong)]}
    prompts = [prompt] + ([prompt | {"text": state.b_text}] if state.b_text is not None else [])
    return hw.Experiment(
        model=models.source(state.model),
        revision=model.revision,
        prompts=prompts,
        edits=edits,
        measures=list(dict.fromkeys(measures)),
        part=state.part or None,
        dtype=str(model.dtype).removeprefix("torch."),
    )


def run(experiment: hw.Experiment, state: State, folder: Path) -> Results:
    """What the experiment gives here and now; `folder` is where its picture lies."""
    return experiment.run(resident(state.model), folder=folder)


def archive(found: Mapping[str, bytes]) -> bytes:
    """The files as one zip; the same files give the same bytes."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as into:
        for name, content in found.items():
            into.writestr(zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0)), content)
    return out.getvalue()


def picture_bytes(state: State) -> bytes:
    """The picture of a state as a PNG."""
    if not state.picture.startswith(inputs.SAMPLE):
        return workspace.kept("pictures", state.picture) or b""
    shown = inputs.image_of(state)
    if isinstance(shown, list):
        raise ExperimentError("an experiment holds pictures, and no film; take the Python instead")
    out = io.BytesIO()
    shown.save(out, "PNG")
    return out.getvalue()


def take(text: str, state: State) -> None:
    """Show an experiment's model, first prompt and edits; ExperimentError where this dashboard can not."""
    given = hw.Experiment.from_json(text)
    name = next((each for each in models.offered() if given.model in (each, models.source(each))), None)
    if name is None:
        raise ExperimentError(
            f"the experiment is of the model {given.model!r}, which is not offered here; start with it: "
            "headwater dashboard MODEL"
        )
    edits_of(given.edits)
    first = given.prompts[0]
    if first.text is None or first.files:
        what = "with a picture or a sound" if first.tokens is None else "of token ids"
        raise ExperimentError(f"the experiment's first prompt is {what}; the dashboard opens texts alone")
    fresh = State(model=name, text=str(first.text), decoder=str(first.decoder or ""), part=given.part or "")
    model = resident(name)
    fresh.part = "" if fresh.part == model.part_name else fresh.part
    fresh.edits, fresh.shown, fresh.settings = (
        [_on_its_part(edit, fresh.part, model.part_name) for edit in given.edits],
        "b" if given.edits else "a",
        state.settings,
    )
    fresh.kind = next((kind for kind, called in NAMES.items() if called in given.measures), "")
    if first.answer is not None:
        fresh.answer = named(model, first.answer, "answer")
        fresh.wrong = named(model, first.wrong[0], "wrong") if first.wrong else None
    if maps := [each for each in given.measures if each.startswith(ATTENTION)]:
        fresh.choose_head(*hw.Head.parse(maps[0].removeprefix(ATTENTION)))
    if len(given.prompts) > 1:
        fresh.notices.append(f"The experiment has {len(given.prompts)} prompts; this is the first.")
    if given.revision is not None and not model.weights_digest.matches(given.revision):
        fresh.notices.append("The experiment was made with other weights; the numbers will differ.")
    vars(state).update(vars(fresh))


def _on_its_part(edit: Mapping[str, Any], part: str, main: str) -> dict[str, Any]:
    """An edit of an experiment on `part` as one of a state, which names no part where it is the main one."""
    named = str(edit.get("part") or part)
    rest = {name: value for name, value in edit.items() if name != "part"}
    return rest if named in ("", main) else {**rest, "part": named}


def gap(results: Results, state: State, chosen: Measure) -> float | None:
    """The largest difference of the measure between an experiment's results and what the pages show.

    None where the two state other quantities, as for two towers: their loss, and the similarity of text and picture.
    """
    other = runs.b(state)
    pairs = [(results.results[0]["before"], chosen.plain)]
    if other is not None:
        last = results.results[-1]
        pairs.append((last["after"] if state.applied() else last["before"], other))
    gaps = []
    for found, run_shown in pairs:
        value, shown = found.get(NAMES[chosen.kind]), _as_stated(chosen, run_shown)
        if isinstance(value, int | float) and shown is not None:
            gaps.append(abs(value - shown))
    return max(gaps, default=None)


def _as_stated(chosen: Measure, shown: Run) -> float | None:
    """The measure of a run as an experiment states it; None where it states another quantity."""
    if chosen.kind == "match":
        return None
    value = chosen.value(shown)
    if value is None or chosen.kind != "log_probability":
        return value
    return math.exp(value)


def _named(plain: Run, number: int) -> str | int:
    return plain.labels[number] if plain.labels else f"#{number}"


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
