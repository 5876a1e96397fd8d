"""Attention frozen as another run had it; patterns by formula are in `test_dense_meaning.py`."""

from __future__ import annotations

import json

import pytest
import tiny_models
import torch

import headwater as hw
from headwater.lens.errors import EditError


@pytest.fixture(scope="module")
def model():
    return hw.load(tiny_models.tiny("llama"))


def test_frozen_attention_is_that_of_the_other_run(model, tmp_path):
    ids, mask = tiny_models.batch(7, (9, 7))
    other, _ = tiny_models.batch(8, (9, 7))
    record = model.record(other, mask)
    path = str(record.save(tmp_path / "other.safetensors"))
    some = ["0.1", "2.3"]
    for edit in (hw.FreezeAttention(record, heads=some), hw.FreezeAttention(path, heads=some),
                 hw.InjectPattern(record, heads=some)):  # fmt: skip
        with model.edit(edit):
            after = model.record(ids, mask)
        for layer, head in ((0, 1), (2, 3)):
            torch.testing.assert_close(
                after.pattern(layer, head), record.pattern(layer, head), atol=1e-6, rtol=1e-5
            )
        assert not torch.allclose(after.pattern(0, 0), record.pattern(0, 0), atol=1e-3)
    assert hw.edit_from_dict(hw.FreezeAttention(path).to_dict()) == hw.FreezeAttention(path)
    for edit in (hw.FreezeAttention(record), hw.InjectPattern(record)):
        read = hw.edit_from_dict(json.loads(json.dumps(edit.to_dict())))
        with pytest.raises(EditError, match="in memory"):
            model.edit(read)
    with model.edit(hw.FreezeAttention(model.record(other[:1]), heads=some)):
        text = model.generate(ids[:1], 3)
        step = ids[:1]
        for _ in range(3):
            step = torch.cat([step, model(step)[:, -1].argmax(-1, keepdim=True)], -1)
        assert text.equal(step), "rows behind the record are left as they are"
    one = ids[:1, :1]
    with model.edit(hw.FreezeAttention(model.record(one))):
        assert model.generate(one, 3).shape == (1, 4), "one token, and steps of one query that are not it"
    with model.edit(hw.FreezeAttention(model.record(other[:1]), heads=some)):
        with pytest.raises(EditError, match="the record has 9 tokens and this run 5"):
            model(ids[:1, :5])
        with pytest.raises(EditError, match="the record has 1 batch rows and this run 2"):
            model(ids)
    with model.edit(hw.FreezeAttention(record)), pytest.raises(EditError, match="padded otherwise"):
        model(ids)
    gpt2 = hw.load(tiny_models.tiny("mistral"))
    with gpt2.edit(hw.FreezeAttention(model.record(other))), pytest.raises(EditError, match="another window"):
        gpt2(ids)
