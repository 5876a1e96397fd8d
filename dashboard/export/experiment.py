"""An edited run as something to take away and bring back: Python, an experiment, and JSON with what it showed."""

from __future__ import annotations

from collections.abc import Sequence

import headwater as hw
from headwater.dashboard.running import models
from headwater.dashboard.running.models import resident, source
from headwater.dashboard.running.runs import Run, edits_of
from headwater.dashboard.state.state import State
from headwater.lens.errors import ExperimentError
from headwater.lens.experiments.measures import ATTENTION, LONGEST_MAP


def as_python(model: str, prompt: str, edits: Sequence[dict]) -> str:
    lines = "".join(f"    {edit.to_python()},\n" for edit in edits_of(edits))
    return (
        f"import headwater as hw\n\nmodel = hw.load({source(model)!r})\nprompt = {prompt!r}\n"
        f"edits = [\n{lines}]\n"
        "before = model.record(prompt)\n"
        "with model.edit(*edits):\n    after = model.record(prompt)\n    logits = model(prompt)\n"
    )


def as_experiment(state: State, before: Run) -> hw.Experiment:
    """What the page shows, as an experiment that `headwater experiment FILE` runs and verifies."""
    measures = [f"attention:{state.layer}.{state.head}"] if len(before.queries) <= LONGEST_MAP else []
    if before.logits.size:
        measures += ["next_token"] if before.loss is None else ["loss", "next_token"]
    else:
        measures.append("similarity")
    model = resident(state.model)
    return hw.Experiment(
        model=state.model,
        revision=model.revision,
        prompts=[state.text],
        edits=state.applied(),
        measures=measures,
        dtype=str(model.dtype).removeprefix("torch."),
    )


def take(text: str, state: State) -> None:
    """Show an experiment's model, first prompt and edits; ExperimentError where this dashboard can not."""
    given = hw.Experiment.from_json(text)
    if given.model not in models.offered():
        raise ExperimentError(
            f"the experiment is of the model {given.model!r}, which is not offered here; start with it: "
            "headwater dashboard MODEL"
        )
    edits_of(given.edits)
    first = given.prompts[0]
    if first.text is None or first.files or first.decoder is not None or given.part is not None:
        what = "of a part, a decoder's text, a picture or a sound" if first.tokens is None else "token ids"
        raise ExperimentError(f"the experiment's first prompt is {what}; the dashboard shows texts alone")
    state.model, state.text, state.edits = given.model, first.text, list(given.edits)
    state.new_input()
    maps = [name for name in given.measures if name.startswith(ATTENTION)]
    if maps:
        state.choose_head(*hw.Head.parse(maps[0].removeprefix(ATTENTION)))
    if len(given.prompts) > 1:
        state.notices.append(f"The experiment has {len(given.prompts)} prompts; this is the first.")
    if given.revision is not None and not resident(given.model).weights_digest.matches(given.revision):
        state.notices.append("The experiment was made with other weights; the numbers will differ.")
