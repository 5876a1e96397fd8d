"""A record says which weights, which edits and which versions its numbers are from.

Mutation seen to fail: edits left out.
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
