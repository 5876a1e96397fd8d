"""A record says which weights, which edits and which versions its numbers are from.

Mutations seen to fail: edits left out, sums of rows not told.
"""

from __future__ import annotations

import tiny_models
import torch
import transformers

import headwater as hw


def test_a_record_says_where_it_is_from():
    model = hw.load(tiny_models.tiny("gpt2"))
    edits = [hw.Redistribute([0], 0.2), hw.ScaleHeads({"1.1": 0.5})]
    with model.edit(*edits):
        found = model.record(torch.tensor([[5, 6, 7]])).provenance
    assert found["edits"] == [edit.to_dict() for edit in edits]
    assert (found["model"], found["revision"]) == (model.name, model.revision)
    assert (found["torch"], found["transformers"]) == (torch.__version__, transformers.__version__)
    assert found["dtype"] == "float32"
    assert "attention" not in found
    assert model.record(torch.tensor([[5, 6, 7]])).provenance["edits"] == []


def test_a_record_and_its_statistics_say_when_rows_do_not_sum_to_one():
    model = hw.load(tiny_models.tiny("gpt2"))
    with model.edit(hw.ScaleWeights([0], 2.0), hw.Redistribute([0], 0.5)):
        record = model.record(torch.tensor([[5, 6, 7]]))
    told = "the weights of a row do not sum to 1 under ScaleWeights"
    assert record.provenance["row_sums"] == told
    assert record.statistic("row_mass").attrs["row_sums"] == told
    assert float(record.statistic("row_mass").max()) > 1.01
    with model.edit(hw.Redistribute([0], 0.5)):
        assert "row_sums" not in model.record(torch.tensor([[5, 6, 7]])).provenance
