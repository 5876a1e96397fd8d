"""`record(..., grad=True)`: every part's maps carry gradients, held against autograd of transformers' eager attention.

`graph.py` takes the graph away again.

Seen to fail: the map detached, what `attend` gives detached, the weights of a read-only model detached.
"""

from __future__ import annotations

import copy
import pickle

import pytest
import tiny_models
import torch

import headwater as hw
from headwater.lens.errors import ModelError, RecordError
from headwater.lens.loading import zoo

ATTENTIONS = {
    "gpt2": {None: "attentions"},
    "vit": {None: "attentions"},
    "gptj": {None: "attentions"},  # read-only
    "t5": {None: "decoder_attentions", "encoder": "encoder_attentions", "cross": "cross_attentions"},
}


def pair(name: str):
    eager = zoo.build(name)
    eager.set_attn_implementation("eager")
    return hw.load(copy.deepcopy(eager)), eager, zoo.inputs(name)


def weighed(maps: list[torch.Tensor]) -> torch.Tensor:
    """A number of maps, to which every weight adds its own share."""
    generator = torch.Generator().manual_seed(1)
    return sum((a * torch.randn(a.shape, generator=generator)).sum() for a in maps)


@pytest.mark.parametrize("name", list(ATTENTIONS))
def test_gradients_of_maps_are_those_of_eager_attention(name):
    model, eager, inputs = pair(name)
    record = model.record(**inputs, grad=True, statistics=())
    out = eager(**inputs, output_attentions=True)
    torch.testing.assert_close(record.output[0], out[0], atol=1e-5, rtol=1e-4)
    ours, theirs = record.output[0].square().mean(), out[0].square().mean()
    for part, field in ATTENTIONS[name].items():
        of = record if part is None else record.part(part)
        ours = ours + weighed([of.pattern(layer) for layer in of.layers])
        theirs = theirs + weighed(list(getattr(out, field)))
    ours.backward()
    theirs.backward()
    for (key, found), expected in zip(model.hf.named_parameters(), eager.parameters(), strict=True):
        assert (found.grad is None) == (expected.grad is None), key
        if expected.grad is not None:
            torch.testing.assert_close(found.grad, expected.grad, atol=1e-5, rtol=1e-3, msg=key)


def test_pictures_get_a_gradient_through_products_statistics_and_values():
    model, eager, inputs = pair("vit")
    pixels = inputs["pixel_values"]
    leaves = [pixels.clone().requires_grad_() for _ in range(2)]
    record = model.record(leaves[0], grad=True, statistics=("entropy",), keep=("qkv", "residual"))
    maps = eager(leaves[1], output_attentions=True, output_hidden_states=True)
    columns = torch.randn(record.tokens.shape[1], 2)
    ours = (record.map(1) @ columns).square().sum() + (record.map(0).T @ columns).square().sum()
    ours = ours + record.statistics["entropy"].sum() + record.residual(1).square().sum()
    theirs = (maps.attentions[1] @ columns).square().sum()
    theirs = theirs + (maps.attentions[0].mT @ columns).square().sum()
    theirs = theirs + sum(torch.special.entr(a).sum() for a in maps.attentions)
    theirs = theirs + maps.hidden_states[1].square().sum()
    (found,) = torch.autograd.grad(ours, leaves[0])
    (expected,) = torch.autograd.grad(theirs, leaves[1])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-3)
    assert record.values[0].requires_grad
    assert record.statistic("entropy").dims == ("batch", "layer", "head", "query")


def test_a_model_run_by_its_owner_gives_its_attentions():
    model, eager, inputs = pair("vit")
    expected = eager(**inputs, output_attentions=True).attentions
    found = model.hf(**inputs, output_attentions=True).attentions
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)
    with torch.no_grad(), model.edit(hw.Knockout("all", [0])):
        assert model.hf(**inputs, output_attentions=True).attentions[0][..., 0].max() == 0
    (slope,) = torch.autograd.grad(found[-1][..., 0].sum(), model.attention_module(0).q_proj.weight)
    assert slope.abs().max() > 0


def test_edits_that_are_on_are_part_of_the_graph():
    model = hw.load(tiny_models.tiny("llama"))
    ids, mask = tiny_models.batch()
    with model.edit(hw.Knockout("all", [3])):
        record = model.record(ids, mask, grad=True, statistics=())
    assert record.pattern(1)[..., 3].abs().max() == 0
    weight = model.attention_module(0).k_proj.weight
    (slope,) = torch.autograd.grad(record.pattern(1).square().sum(), weight)
    assert slope.isfinite().all()
    assert slope.abs().max() > 0


def test_a_record_without_its_graph_is_saved_copied_and_drawn(tmp_path):
    model = hw.load(zoo.build("t5"))
    record = model.record(**zoo.inputs("t5"), grad=True, keep=("qkv", "residual"))
    with pytest.raises(RecordError, match="save record"):
        record.part("encoder").save(tmp_path / "part")  # a part has no output of its own
    plain = record.detach()
    assert plain.output is None
    assert plain.detach() is plain
    assert record.part("cross").map(0).q.requires_grad
    assert not plain.part("cross").map(0).q.requires_grad
    plain.save(tmp_path / "whole")
    copies = (hw.Record.open(tmp_path / "whole"), copy.deepcopy(plain), pickle.loads(pickle.dumps(plain)))
    for found in (plain, *copies):
        for part in (None, *record.parts):
            ours, theirs = (each if part is None else each.part(part) for each in (found, record))
            assert torch.equal(ours.pattern(0), theirs.pattern(0).detach())
            assert torch.equal(ours.statistics["entropy"], theirs.statistics["entropy"].detach())
            assert torch.equal(ours.values[0], theirs.values[0].detach())
        assert torch.equal(found.residual(0), record.residual(0).detach())
    assert hw.figure(record).data == hw.figure(plain).data
    assert hw.figure(record.map(0), head=1).data == hw.figure(plain.map(0), head=1).data


def test_what_holds_no_graph_says_so(tmp_path):
    model = hw.load(tiny_models.tiny("gpt2"))
    ids, mask = tiny_models.batch()
    with pytest.raises(RecordError, match="a file holds no graph"):
        model.record(ids, mask, grad=True, keep_on="disk")
    record = model.record(ids, mask, grad=True, statistics=())
    with pytest.raises(RecordError, match="no file holds the graph"):
        record.save(tmp_path / "record")
    for copied in (copy.deepcopy, pickle.dumps):
        with pytest.raises(RecordError, match="give record"):
            copied(record)
    assert copy.copy(record).map(0) is record.map(0)
    with torch.inference_mode(), pytest.raises(RecordError, match="finds no graph"):
        model.record(ids, mask, grad=True, statistics=())
    with torch.no_grad():  # as a loss is read between two steps
        assert model.record(ids, mask, grad=True, statistics=()).map(0).q.requires_grad
    plain = model.record(ids, mask)
    assert plain.output is None
    assert not plain.pattern(0).requires_grad
    with pytest.raises(ModelError, match="differentiable map"), model.using("flash"):
        model.record(ids, mask, grad=True)
