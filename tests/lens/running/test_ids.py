"""The token ids of the prompt that runs are known to edits, on either side of a model and while a text grows."""

from __future__ import annotations

import pytest
import tiny_models
import torch

import headwater as hw
from headwater.lens.errors import EditError
from headwater.lens.loading import zoo


@pytest.fixture(scope="module")
def model():
    return hw.load(tiny_models.tiny("llama"))


def test_ids_are_known_when_the_transformers_model_is_called_itself(model):
    ids = torch.tensor([[5, 20, 33, 20, 34, 35]])
    with model.edit(hw.Knockout(-1, "token:#20")), torch.no_grad():
        assert model.hf(ids, use_cache=False).logits.equal(model(ids))
        with pytest.raises(EditError, match="the token ids of this call are not known"):
            model.hf(inputs_embeds=model.hf.get_input_embeddings().weight[ids], use_cache=False)
    with model.edit(hw.Redistribute("sinks:share:0.1")):
        model(ids)
        with pytest.raises(EditError, match="found on another prompt"), torch.no_grad():
            model.hf(ids + 1, use_cache=False)


@pytest.mark.parametrize("name", ["t5", "bart"])
@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_tokens_of_either_side_are_known(name, part):
    """Encoder and decoder embed by tables of their own."""
    whole = hw.load(zoo.build(name))
    one = whole.part(part)
    heard, said = torch.tensor([[5, 6, 5, 7, 6, 5]]), torch.tensor([[4, 8, 4, 4]])
    ids = heard if part == "encoder" else said
    with one.edit(hw.InjectPattern("matching", heads=["0.1"])):
        record = whole.record(heard, decoder_input_ids=said)
    found = (record.part("encoder") if part == "encoder" else record).pattern(0, 1)[0]
    earlier = (ids[0][:, None] == ids[0]).tril(-1).float()
    some = earlier.sum(-1) > 0
    torch.testing.assert_close(found[some], (earlier / earlier.sum(-1, keepdim=True))[some])


def test_generated_tokens_are_a_group_in_generation(model):
    ids, _ = tiny_models.batch(4, (6, 6))
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    with model.edit(hw.Knockout("generated", "text")):
        found = model.generate(ids, 4, attention_mask=mask)
    with model.edit(hw.Knockout(slice(6, None), slice(0, 6))):
        assert found[1].equal(model.generate(ids[1:], 4)[0])
    with model.edit(hw.Knockout(slice(4, None), slice(0, 4))):
        assert found[0, 2:].equal(model.generate(ids[:1, 2:], 4)[0])
    assert not found.equal(model.generate(ids, 4, attention_mask=mask))
