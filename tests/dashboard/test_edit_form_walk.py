"""Each kind of edit of the form, on parts of many models: made, linked and exported, or refused in one line."""

from __future__ import annotations

import contextlib
import io

import pytest
import sense_folders
from opened_app import opened, settled

from headwater.dashboard.export.python import as_python
from headwater.dashboard.parts import edit_form
from headwater.dashboard.running import edit_kinds, made_edits, measure, models, runs
from headwater.dashboard.state.address import from_address, to_address
from headwater.lens.errors import EditError
from headwater.lens.models import embedded

ANSWERS = {  # where the form has no first answer
    "Knockout": {"edit.knockout_keys": [1]},
    "MoveAttention": {"edit.moveattention_to": [1]},
    "PositionInvariant": {"edit.positioninvariant_documents": [[1, 3], [3, 5]]},
    "RedistributeMassive": {"edit.redistributemassive_dimensions": [0, 1]},
}
PLACES = [
    ("tasks-4l", ""), ("vit-digits", ""), ("clip-digits", "text"), ("clip-digits", "vision"), ("vlm-digits", ""),
    ("vlm-digits", "vision"), ("t5", ""), ("t5", "encoder"), ("t5", "cross"),
]  # fmt: skip


@pytest.fixture(scope="module")
def t5(tmp_path_factory) -> str:
    return str(sense_folders.save("t5", tmp_path_factory.mktemp("walk") / "t5"))


@pytest.fixture(autouse=True)
def offered_here(t5, monkeypatch) -> None:
    monkeypatch.setattr(models, "embedded", embedded.embedded)
    monkeypatch.setattr(models, "_given", {})
    models.allow(t5)


def at(name: str, part: str):
    more = {"prompt": "the cat sat on a mat", "decoder": "the cat"} if name == "t5" else {}
    app = settled(opened("edit", model=name, part=part, **more))
    assert not app.error
    return app


def chosen(app, kind: str):
    """The form with this kind of edit or recipe in it, and nothing in the list."""
    state = app.session_state["headwater"]
    state.edits.clear()
    state.shown = "a"
    if kind in edit_kinds.kinds():
        common = (
            {"edit.kind": kind} if kind in edit_kinds.COMMON else {"edit.kind": "more", "edit.more": kind}
        )
    else:
        common = {"edit.kind": "more", "edit.more": "recipes", "edit.recipe": kind}
    state.settings = common | ANSWERS.get(kind, {})
    if kind in ("EditResidual", "EditMLP"):  # a direction that every part has
        name, numbers = f"edit.{kind.lower()}_vector", [1.0] + [0.0] * (runs.model_of(state).d_model - 1)
        state.settings |= {f"{name}_of": "numbers", name: str(numbers)}
    app.session_state["headwater-touched"] = True
    return app.run()


def add(app) -> list[str]:
    """Press the button; gives what is told in red or yellow."""
    assert not app.exception
    app.button(key="add-edit").click().run()
    settled(app)
    assert not app.exception
    return [each.value.replace("\\", "") for each in (*app.error, *app.warning)]


def check_made(app) -> None:
    """Run B is what the link and the exported Python give."""
    state = app.session_state["headwater"]
    linked = from_address(to_address(state), models.offered(), runs.edits_of)
    assert (linked.edits, linked.notices) == (state.edits, [])
    of = measure.of(state, runs.a(state))
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(as_python(state, of), {})
    found = [float(line[3:]) for line in out.getvalue().splitlines() if line.startswith(("A: ", "B: "))]
    meant = [of.value(run) for run in (runs.a(state), runs.b(state)) if run is not None]
    assert found == pytest.approx(meant, abs=1e-5)
    assert len(meant) == 2


def walk(app, kind: str) -> bool:
    """Whether the edit was made; where not, one plain line has said why."""
    told = add(chosen(app, kind))
    state = app.session_state["headwater"]
    if state.edits:
        assert told == [], kind
        check_made(app)
        return True
    assert len(told) == 1, (kind, told)
    assert "\n" not in told[0]
    assert not any(word in told[0] for word in ("Traceback", "fault", "pixel_values"))
    return False


@pytest.mark.slow
def test_every_kind_of_edit_somewhere():
    """Each kind at two of the places, so that all places have some: a walk over all pairs takes minutes."""
    apps = {place: at(*place) for place in PLACES}
    made = set()
    for number, kind in enumerate(edit_kinds.kinds()):
        for step in (0, 4):
            if walk(apps[PLACES[(number + step) % len(PLACES)]], kind):
                made.add(kind)
    assert set(edit_kinds.kinds()) - made <= {
        "PositionInvariant",
        "PruneTokens",
        "EditMLP",
    }  # fit few of the places


def options(app, name: str) -> list[str]:
    return app.selectbox(key=f"bound-edit-{name}").options


def test_what_a_part_does_not_take_is_one_line_or_is_not_offered():
    app = at("clip-digits", "text")
    assert not walk(app, "PositionInvariant")
    assert "it is no causal language model" in app.error[0].value
    assert walk(app, "EditMLP")
    app = chosen(app, "Redistribute")
    assert edit_form.GROUPS["image"] not in options(app, "redistribute_keys_by")
    assert edit_form.HOW["all"] not in options(app, "redistribute_to_by")
    app.session_state["headwater"].settings |= {
        "edit.redistribute_keys_by": "word", "edit.redistribute_keys_word": "zebra"
    }  # fmt: skip
    assert add(app.run()) == ["Redistribute: the input has no 'zebra'"]
    assert not app.session_state["headwater"].edits
    app = at("vlm-digits", "vision")
    app = chosen(app, "Redistribute")
    assert edit_form.GROUPS["image"] in options(app, "redistribute_keys_by")
    assert edit_form.HOW["word"] not in options(app, "redistribute_keys_by")
    app.session_state["headwater"].settings = {"edit.kind": "more", "edit.more": "EditResidual"}
    assert options(app.run(), "editresidual_vector_of") == [made_edits.DIRECTIONS["numbers"]]
    assert walk(app, "EditResidual")
    assert options(chosen(app, "AblateHeads"), "ablateheads_ablation") == [
        "zero"
    ]  # no other text reaches a picture


def test_a_recipe_that_does_not_fit_is_not_made():
    cross = models.resident("t5").part("cross")
    assert "soft_perturbation" not in made_edits.fitting_recipes(cross)
    with pytest.raises(EditError, match="no meaning in cross-attention"):
        made_edits.made_by("soft_perturbation", cross, "the cat", "all")
