"""Python that repeats what the pages show of runs A and B, as it can be pasted anywhere on this machine."""

from __future__ import annotations

from headwater.dashboard.running import inputs, models, runs
from headwater.dashboard.running.measure import Measure
from headwater.dashboard.running.runs import Run, edits_of
from headwater.dashboard.state import workspace
from headwater.dashboard.state.state import State
from headwater.lens.experiments.edits_on_parts import by_part

LISTED = 5  # likeliest tokens or classes that are printed


def as_python(state: State, chosen: Measure) -> str:
    """Loads the model by a path or name that holds from any folder, and prints the measure of A and of B."""
    lines = ["import headwater as hw"]
    if state.picture.startswith(inputs.SAMPLE):
        lines.append("from headwater.lens.examples.sample_pictures import sample_pictures")
    lines += [
        "",
        f"model = hw.load({models.source(state.model)!r})",
        f"given = {_given(state, state.text)}",
        "",
    ]
    lines += [*_function(chosen), ""]
    plain = chosen.kind == "likeness"
    if plain:
        lines.append("plain = model.embeddings(given)")
    lines += ['print("A:", measure(model, given))', *_likeliest(chosen.plain, "model", "given")]
    if state.has_b():
        lines += ["", *_second(state, chosen)]
    lines += ["", *_map(state)]
    return "\n".join(lines) + "\n"


def _given(state: State, text: str) -> str:
    """The input as Python."""
    model = models.resident(state.model)
    what = inputs.given(state, model, text)
    if isinstance(what.example, str):
        return repr(what.example)
    text, picture, decoder = what.key
    parts = [f"text={text!r}"] if text else []
    if picture.startswith(inputs.SAMPLE):
        parts.append(f"image=sample_pictures({state.model!r})[{picture.removeprefix(inputs.SAMPLE)!r}].image")
    elif picture:
        parts.append(f"image={str(workspace.folder() / 'pictures' / picture)!r}")
    parts += [f"decoder={decoder!r}"] if decoder else []
    return f"hw.Example({', '.join(parts)})"


def _function(chosen: Measure) -> list[str]:
    """The measure as a function; its docstring is what the pages call it."""
    head = ["def measure(model, given):", f"    {chosen.label!r}"]
    if chosen.kind == "loss":
        return [*head, "    return float(model.loss(given)[0])"]
    if chosen.kind == "match":
        return [
            *head,
            "    tower = model.hf  # its logits are the similarity, scaled and shifted",
            "    shift = getattr(tower, 'logit_bias', None)",
            "    logit = model(given).reshape(-1)[0] - (0 if shift is None else shift)",
            "    return (logit / tower.logit_scale.exp()).item()",
        ]
    if chosen.kind == "likeness":
        return [
            *head,
            "    hidden = model.embeddings(given)",
            "    return float((hidden.double() * plain.double()).sum(-1).div(",
            "        hidden.double().norm(dim=-1) * plain.double().norm(dim=-1)).mean())",
        ]
    row = "model(given)[0]"
    if chosen.position is not None:
        row, head[0] = "model(given)[0, position]", f"def measure(model, given, position={chosen.position}):"
    lines = [*head, f"    known = {row}.double().log_softmax(-1)"]
    if chosen.kind == "difference" and chosen.wrong is not None:
        return [*lines, f"    return float(known[{chosen.answer}] - known[{chosen.wrong}])"]
    end = ".exp()" if chosen.kind == "probability" else ""
    return [*lines, f"    return float(known[{chosen.answer}]{end})"]


def _of_a_token(chosen: Measure) -> bool:
    """Whether it is of the prediction at one token, so that another text has it elsewhere."""
    return chosen.answer is not None and chosen.position is not None


def _likeliest(run: Run, model: str, given: str, indent: str = "") -> list[str]:
    if not run.logits.size:
        return []
    row = f"{model}({given})[0]" if run.position is None else f"{model}({given})[0, {run.position}]"
    name = f"{model}.classes[n]" if run.labels else f"{model}.to_strings([n])[0]"
    return [
        f"{indent}shares = {row}.double().softmax(-1)",
        f"{indent}ranked = shares.argsort(descending=True)[:{LISTED}].tolist()",
        f"{indent}print([({name}, round(float(shares[n]), 6)) for n in ranked])",
    ]


def _second(state: State, chosen: Measure) -> list[str]:
    """Run B: another model, another text, and the edits."""
    lines, model, given = [], "model", "given"
    if state.b_model is not None:
        lines.append(f"other = hw.load({models.source(state.b_model)!r})")
        model = "other"
    if state.b_text is not None:
        lines.append(f"given_b = {_given(state, state.b_text)}")
        given = "given_b"
    edits = by_part(models.resident(state.model), edits_of(state.applied()))
    run = runs.b(state)
    shown = chosen.plain if run is None else run
    body: list[str] = []
    if chosen.value(shown) is not None:
        place = "" if not _of_a_token(chosen) or shown.position == chosen.position else f", {shown.position}"
        body = [f'print("B:", measure({model}, {given}{place}))']
    body += _likeliest(shown, model, given)
    if not edits:
        return lines + body
    main, blocks = models.resident(state.model).part_name, []
    for part, of_part in edits.items():
        name = "edits" if part == main else f"edits_of_{part}"
        lines += [f"{name} = [", *(f"    {edit.to_python()}," for edit in of_part), "]"]
        blocks.append(f"{model}{'' if part == main else f'.part({part!r})'}.edit(*{name})")
    return [*lines, f"with {', '.join(blocks)}:", *(f"    {line}" for line in body)]


def _map(state: State) -> list[str]:
    part = f".part({state.part!r})" if state.part else ""
    return [
        f"record = model{part}.record(given)",
        f"print(record.pattern({state.layer}, {state.head})[0])  # weights [query, key]",
    ]
