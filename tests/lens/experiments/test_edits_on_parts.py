"""Edits that name their part: in an experiment, in every run of the model, and off again."""

from __future__ import annotations

import pytest
import sense_folders
import torch

import headwater as hw
from headwater.lens.errors import EditError, ExperimentError, ModelError
from headwater.lens.experiments import edits_on_parts

CUT = {"edit": "Knockout", "queries": "all", "keys": [1]}
TEXT, WRITTEN = "the cat sat on a mat", "the cat"


@pytest.fixture(scope="module")
def t5(tmp_path_factory) -> hw.HookedModel:
    return hw.load(sense_folders.save("t5", tmp_path_factory.mktemp("models") / "t5"))


def test_an_experiment_edits_the_part_that_an_edit_names(t5):
    prompt = {"text": TEXT, "decoder": WRITTEN, "answer": "#3", "wrong": ["#4"]}
    edits = [{**CUT, "part": "encoder"}, {**hw.ScaleHeads({"1.0": 0.0}).to_dict(), "part": "cross"}]
    asked = hw.Experiment(model="t5", prompts=[prompt], edits=edits, measures=["logit_difference"])
    assert hw.Experiment.from_json(asked.to_json()) == asked
    (found,) = asked.run(t5).results
    given = hw.Example(text=TEXT, decoder=WRITTEN)
    plain = t5(given)[0, -1].double()
    with t5.part("encoder").edit(hw.Knockout("all", [1])), t5.part("cross").edit(hw.ScaleHeads({"1.0": 0.0})):
        edited = t5(given)[0, -1].double()
    for when, logits in (("before", plain), ("after", edited)):
        assert found[when]["logit_difference"] == pytest.approx(float(logits[3] - logits[4]), abs=1e-6)
    assert found["before"] != found["after"]
    with (
        t5.part("cross").edit(hw.ScaleHeads({"1.0": 0.0})),
        pytest.raises(ExperimentError, match="has edits on"),
    ):
        asked.run(t5)


def test_edits_of_all_parts_end_with_the_block_and_rest_inside_unedited(t5):
    given = hw.Example(text=TEXT, decoder=WRITTEN)
    plain = t5(given)
    with edits_on_parts.editing(
        t5, [edits_on_parts.read({**CUT, "part": "encoder"}), edits_on_parts.read(CUT)]
    ):
        assert not torch.equal(t5(given), plain)
        with edits_on_parts.unedited(t5):
            torch.testing.assert_close(t5(given), plain)
    torch.testing.assert_close(t5(given), plain)


def test_a_wrong_part_is_told(t5):
    with pytest.raises(ModelError, match="has no part 'encodr'"), \
            edits_on_parts.editing(t5, [edits_on_parts.read({**CUT, "part": "encodr"})]):  # fmt: skip
        pass
    with pytest.raises(EditError, match="the part of an edit is a name"):
        edits_on_parts.read({**CUT, "part": 3})
