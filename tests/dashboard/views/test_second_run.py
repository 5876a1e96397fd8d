"""Run B of another model or another text, on the pages that show it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from opened_app import opened, settled
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

import headwater as hw
from headwater.dashboard.running import flows, head as of_head, inputs, measure, models, runs
from headwater.dashboard.state.state import State
from headwater.lens.errors import AnalysisError

TEXT = "When Mary and John went to the store , John gave"
SHORT = "Mary gave John"


@pytest.fixture
def deeper(small_model, offered, tmp_path) -> str:
    """Another model of the same words: 5 layers of 2 heads."""
    folder = tmp_path / "deeper"
    tokenizer = AutoTokenizer.from_pretrained(small_model)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(1)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=64, n_embd=16, n_layer=5, n_head=2, bos_token_id=0, eos_token_id=0,
        initializer_range=0.3,
    )  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(folder)
    models.allow(str(folder))
    return str(folder)


def test_methods_and_writing_read_the_answer_where_the_run_predicts(offered):
    state = State("small", text=TEXT, b_text=SHORT, shown="b")
    one, other = runs.a(state), runs.b(state)
    chosen = measure.of(state, one)
    assert other is not None
    assert one.position != other.position
    asked = {**chosen.settings, "position": other.position}
    model = models.resident("small")
    expected = hw.analyses.input_x_gradient(model, SHORT, **asked).values[0]
    row = flows.of_model(state, other, chosen, ("input_x_gradient",), other.position or 0, {})
    np.testing.assert_allclose(row["input_x_gradient"].values, expected)
    asked.pop("kind")
    moved = hw.analyses.ov_decomposition(model, SHORT, head="0.0", **asked).isel(batch=0).sum("component")
    np.testing.assert_allclose(of_head.writes(state, other, chosen)["logit"], moved.values)


def test_measures_with_one_label_are_told_apart(offered):
    state = State("small", text=TEXT, answer=4, wrong=5)
    one = measure.of(state, runs.a(state))
    other = measure.of(State("small", text=TEXT, answer=4, wrong=6), runs.a(state))
    assert one.key != other.key


def test_a_measure_is_not_read_from_other_words(offered):
    state = State("small", text=TEXT, b_text=SHORT)
    one, other = runs.a(state), runs.b(state)
    chosen = measure.of(state, one)
    assert other is not None
    assert chosen.value(other) is not None
    foreign = runs.Run(**{**vars(other), "name": "another", "labels": tuple("x" * len(other.logits))})
    assert chosen.value(foreign) is None
    with pytest.raises(AnalysisError, match="other answers"):
        chosen.of_run(foreign)


@pytest.mark.parametrize(("layer", "head", "shown"), [("4", "1", "4.1"), ("2", "3", "2.1")])
def test_the_heads_are_those_of_the_model_of_run_b(deeper, layer, head, shown):
    app = opened("head", model="small", prompt=TEXT, b_model="deeper", shown="b", layer=layer, head=head)
    assert not app.error
    assert app.header[0].value == f"Head {shown}"


def test_jobs_of_a_head_are_those_of_the_model_of_run_b(deeper):
    app = settled(
        opened("head", model="small", prompt=TEXT, b_model="deeper", shown="b", layer="4", head="1")
    )
    found = next(each.value for each in app.dataframe if "above" in each.value)
    expected = of_head.roles(hw.analyses.head_roles(hw.load(deeper)), 4, 1)
    np.testing.assert_allclose(found["score"], expected["score"])


PAGES = ["head", "heads", "flow", "sinks", "circuits", "edit", "compare", "experiments", "catalogue"]


@pytest.mark.parametrize("page", PAGES)
def test_a_run_b_that_can_not_be_made_leaves_run_a(deeper, page):
    app = opened(
        page, model="small", prompt=TEXT, b_model="deeper", b_prompt=" ".join(["Mary"] * 90), shown="b"
    )
    assert not app.error
    assert any("Run B can not be made" in each.value for each in app.warning)


@pytest.mark.parametrize("page", PAGES)
def test_a_model_with_other_words_meets_no_fault(page):
    """Its vocabulary has no token of the number that the measure asks for."""
    app = settled(opened(page, model="tasks-4l", prompt=TEXT, b_model="sink-2l-softmax", shown="b"))
    assert not app.error


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        ("vit-digits", "tasks-4l", "reads texts, and run A is of a picture alone"),
        ("tasks-4l", "vit-digits", "reads pictures, and run A is of a text"),
    ],
)
def test_a_model_that_reads_something_else_is_told_and_what_to_do(first, second, words):
    app = opened("heads", model=first, b_model=second, shown="b")
    assert not app.error
    assert words in app.warning[0].value.replace("\\", "")


def test_a_sample_of_one_models_is_no_sample_of_another_of_that_name():
    state = State("clip-digits", b_model="vit-digits")
    inputs.fill(state, models.resident("clip-digits"))
    other = runs.b(state)
    assert other is not None
    np.testing.assert_allclose(
        other.logits,
        models.resident("vit-digits")(hw.Example(image=inputs.image_of(state)))[0].double(),
        atol=1e-6,
    )
    assert other.key[1] == f"{state.picture} of clip-digits"
