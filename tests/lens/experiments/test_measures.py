"""What an experiment asks of a model, against the library asked directly.

Seen to fail with edits on in the "before" run.
"""

from __future__ import annotations

import pytest
import tiny_models
import torch
from small_experiments import EDITS, PROMPT, asked

import headwater as hw
from headwater.lens.errors import ExperimentError, HeadwaterError


@pytest.fixture(scope="module")
def model():
    return hw.load("tasks-4l")


def test_every_measure_is_what_the_library_gives(model):
    names = [
        "loss",
        "next_token",
        "logit_difference",
        "probability",
        "similarity",
        "entropy",
        "attention:2.1",
    ]
    found = asked(measures=names).run(model).results[0]
    mary, john = (model.tokenizer.convert_tokens_to_ids(word) for word in ("Mary", "John"))
    plain = model.embeddings(PROMPT)[0]
    for when, edits in (("before", []), ("after", EDITS)):
        with model.edit(*edits):
            logits, loss = model(PROMPT)[0, -1].double(), model.loss(PROMPT)
            record, hidden = model.record(PROMPT), model.embeddings(PROMPT)[0]
        values = found[when]
        assert values["loss"] == float(loss[0])
        assert values["next_token"]["ids"] == logits.topk(10).indices.tolist()
        assert values["next_token"]["probabilities"][0] == pytest.approx(float(logits.softmax(-1).max()))
        assert values["logit_difference"] == pytest.approx(float(logits[mary] - logits[john]))
        assert values["probability"] == pytest.approx(float(logits.softmax(-1)[mary]))
        cosines = (plain * hidden).sum(-1) / plain.norm(dim=-1) / hidden.norm(dim=-1)
        assert values["similarity"] == pytest.approx(float(cosines.mean()), abs=1e-5)
        means = record.statistic("entropy")[0].mean("query").values
        assert torch.tensor(values["entropy"]).allclose(torch.tensor(means).float(), atol=1e-6)
        assert torch.tensor(values["attention:2.1"]).allclose(record.pattern(2, 1)[0])
    assert found["before"]["loss"] != found["after"]["loss"]
    assert model.edits == ()


def test_without_edits_there_is_no_after_and_models_in_memory_run(tmp_path):
    hooked = hw.load(tiny_models.tiny("bert"))
    given = hw.Experiment(model="x", prompts=[{"tokens": [5, 6, 7]}], measures=["similarity", "entropy"])
    assert list(given.run(hooked).results[0]) == ["before"]
    with pytest.raises(HeadwaterError, match="no next-token loss"):
        hw.Experiment(model="x", prompts=[{"tokens": [5, 6, 7]}]).run(hooked)
    with pytest.raises(ExperimentError, match="has edits on already"), hooked.edit(hw.TowardIdentity(0.5)):
        given.run(hooked)
