"""Tokens, groups and kinds of tokens (`special`, `text`) name the positions they stand at in each row.

Seen to fail: a token's text matched within another.
"""

from __future__ import annotations

import pytest
import sense_folders
import tiny_models
import torch

import headwater as hw
from headwater.lens.errors import EditError


@pytest.fixture(scope="module")
def model():
    return hw.load(tiny_models.tiny("llama"))


def edited(model, ids, edit, mask=None, **groups):
    with model.edit(edit, **groups):
        return model(ids, mask)


def test_tokens_groups_and_rules_mean_the_positions_they_stand_at(model):
    ids = torch.tensor([[1, 20, 33, 20, 34, 35], [20, 36, 37, 38, 33, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]])
    keys = {"token:#20": [[1, 3], [0]], "special": [[0], []], "text": [[1, 2, 3, 4, 5], [0, 1, 2, 3, 4]],
            "subject": [[2], [2]], "both": [[2, 1, 3], [2, 0]]}  # fmt: skip
    groups = {"subject": [2], "both": ["subject", "token:#20"]}
    real = mask.bool()
    for name, (one, two) in keys.items():
        found = edited(model, ids, hw.BiasKeys(name, 2.0), mask, groups=groups)
        parts = [hw.BiasKeys(one, 2.0, rows=[0]), hw.BiasKeys(two, 2.0, rows=1)]
        with model.edit(*parts):
            assert model(ids, mask)[real].equal(found[real]), name
    found = edited(model, ids[:1], hw.BiasKeys(["token:#33", -1], 2.0))
    assert found.equal(edited(model, ids[:1], hw.BiasKeys([2, 5], 2.0)))


def test_a_token_of_a_text_is_found_by_what_it_reads():
    tasks = hw.load("tasks-4l")
    text = "When Mary and John went to the store , John gave a drink to"
    tokens = tasks.to_strings(tasks.to_tokens(text).ids[0])
    places = [n for n, token in enumerate(tokens) if token.strip() == "John"]
    assert len(places) == 2
    with tasks.edit(hw.Knockout(-1, "token:John")):
        named = tasks(text)
    with tasks.edit(hw.Knockout(-1, places)):
        assert tasks(text).equal(named)
    with (
        tasks.edit(hw.Knockout(-1, "token:Joh")),
        pytest.raises(EditError, match="no token of the prompt is 'token:Joh'"),
    ):
        tasks(text)


@pytest.mark.parametrize(("part", "named", "numbered"), [
    ("encoder", lambda: hw.BiasKeys("special", -2.0), lambda: hw.BiasKeys([2], -2.0)),
    ("encoder", lambda: hw.Redistribute("text", 0.3), lambda: hw.Redistribute([0, 1, 3], 0.3)),
    ("cross", lambda: hw.Redistribute([1], 0.3, queries="special"), lambda: hw.Redistribute([1], 0.3, queries=[0, 1])),
])  # fmt: skip
def test_groups_of_an_encoders_text_are_those_of_its_ids(part, named, numbered, tmp_path):
    model = hw.load(sense_folders.save("t5", tmp_path / "t5"))
    given = hw.Example(text="the cat </s> sat", decoder="<s> the")
    found = []
    for edit in (named, numbered):
        with model.part(part).edit(edit()):
            found.append(model(given))
    assert torch.equal(*found)
    assert not torch.allclose(found[0], model(given))
