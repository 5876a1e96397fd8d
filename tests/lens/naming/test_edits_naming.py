"""The ways to name heads, positions and rows, JSON and Python of every edit, and one-line refusals.

Seen to fail: sinks of one head taken for all, massive ones of one layer for all, dimensions looked for at column 0, a
token's text matched within another, flat indices read over [head, layer], rows ignored.
"""

from __future__ import annotations

import copy
import dataclasses
import json

import numpy as np
import pytest
import tiny_models
import torch
import xarray as xr

import headwater as hw
from headwater.lens.edits import EDITS
from headwater.lens.errors import EditError, HeadError
from headwater.lens.loading import zoo
from headwater.lens.naming import positions
from headwater.lens.naming.heads import Head, chosen


@pytest.fixture(scope="module")
def model():
    return hw.load(tiny_models.tiny("llama"))


def edited(model, ids, edit, mask=None, **groups):
    with model.edit(edit, **groups):
        return model(ids, mask)


def test_heads_are_named_in_many_ways_that_mean_the_same():
    importance = xr.DataArray(np.array([[3.0, 9.0], [1.0, 8.0], [2.0, 0.0]]), dims=("layer", "head"),
                              coords={"layer": [0, 2, 4], "head": [0, 1]})  # fmt: skip
    flat = importance.values.ravel().argsort()[::-1][:2]  # 0.1 and 2.1
    stacked = importance.stack(unit=("layer", "head"))
    for named in (
        ["0.1", "2.1"], [Head(0, 1), (2, 1)], ("0.1", "2.1"), flat, flat.tolist(), torch.tensor(flat.copy()),
        importance > 5, (importance > 5).values, torch.tensor([[False, True], [False, True], [False, False]]),
        [[False, True], [False, True], [False, False]], stacked.sortby(stacked)[-2:], iter(["2.1", "0.1"]),
        xr.DataArray(flat, dims="n"),
    ):  # fmt: skip
        found = chosen(named, "all", [0, 2, 4], 2)
        assert {layer: mask.tolist() for layer, mask in found.items()} == {
            0: [False, True],
            2: [False, True],
        }, named
    assert chosen(np.array([], dtype=int), "all", [0, 2], 2) == {} == chosen([], "all", [0, 2], 2)
    assert list(chosen(importance > 5, [2], [0, 2, 4], 2)) == [2]


@pytest.mark.parametrize(("heads", "message"), [
    ([12], "no head has the flat index 12; 3 layers × 4 heads go from 0 to 11"),
    (np.array([[0, 1, 2, 3]] * 3), "mask, bool .layer, head., or flat indices"),
    (np.zeros((2, 4), dtype=bool), "must be .3 layers, 4 heads.; got .2, 4."),
    (np.array([0.5]), "flat indices"), ({"5.1": 1}, "heads are 'all'"), (3, "heads are 'all'"), (True, "heads are"),
    (xr.DataArray(np.zeros((4, 3), dtype=bool), dims=("head", "layer")), "dimensions layer and head; got head, layer"),
])  # fmt: skip
def test_wrong_heads_are_refused_in_one_line(model, heads, message):
    with pytest.raises(HeadError, match=message) as caught:
        model.edit(hw.TowardIdentity(0.5, heads=heads))
    assert "\n" not in str(caught.value)


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


def test_sinks_are_each_heads_own_and_stay_in_generation(model):
    ids, _ = tiny_models.batch(5, (12,))
    record = model.record(ids)
    share = (record.statistic("received") / record.statistic("visible")).values[0]
    edits = [
        hw.Redistribute(np.flatnonzero(share[layer, head] > 0.1).tolist(), 0.2, heads=[Head(layer, head)])
        for layer in range(3) for head in range(4) if layer != 1
    ]  # fmt: skip
    assert len({tuple(edit.keys) for edit in edits}) > 2, "heads must differ for this to mean anything"
    with model.edit(*edits):
        expected, text = model(ids), model.generate(ids, 5)
    with model.edit(hw.Redistribute("sinks:share:0.1", 0.2, layers=[0, 2])):
        torch.testing.assert_close(model(ids), expected)
        assert model.generate(ids, 5).equal(text)
        assert model.record(ids).pattern(0).equal(model.record(ids).pattern(0))


@pytest.mark.parametrize("side", ["right", "left"])
def test_massive_sinks_are_a_layers_own_and_stay_in_generation(side):
    plain = tiny_models.tiny("llama")
    with torch.no_grad():  # a token that is large in one dimension, and less so from layer to layer
        plain.model.embed_tokens.weight[7, 3] = 30.0
    model = hw.load(copy.deepcopy(plain))
    ids, mask = tiny_models.batch(5, (12, 9))
    if side == "left":
        ids[1], mask[1] = ids[1].roll(3), mask[1].roll(3)
    ids[1, mask[1].argmax()] = 7
    ids[0, 6] = 7
    second = ids[1:, mask[1].bool()]
    streams = []
    for text, real in zip(ids, mask.bool(), strict=True):
        with torch.no_grad():
            found = plain(text[real][None], output_hidden_states=True).hidden_states[:3]
        stream = torch.zeros(3, 12, 32, dtype=torch.float64)
        stream[:, real] = torch.stack(found)[:, 0].double()
        streams.append(stream)
    size = torch.stack(streams, 1)[..., 3].abs() / (torch.stack(streams, 1).square().mean(-1) + 1e-6).sqrt()
    tau = float(size[0, 0, 6] + size[2, 0, 6]) / 2
    flags = (size > tau).numpy()
    assert len({layer.tobytes() for layer in flags}) > 1, "layers must differ for this to mean anything"
    with model.edit(hw.Redistribute(f"sinks:massive:{tau}", 0.2)):
        edited, text = model(ids, mask), model.generate(second, 4)
    counted = mask.cumsum(1).numpy() - 1
    by_hand = [
        hw.Redistribute(counted[row][flags[layer, row]].tolist(), 0.2, layers=layer, rows=row)
        for layer in range(3) for row in range(2) if flags[layer, row].any()
    ]  # fmt: skip
    with model.edit(*by_hand):
        expected = model(ids, mask)
    torch.testing.assert_close(edited[mask.bool()], expected[mask.bool()])
    before = model(ids, mask)
    assert not torch.allclose(edited[0], before[0], atol=1e-3)
    with model.edit(*(dataclasses.replace(edit, rows="all") for edit in by_hand if edit.rows == 1)):
        assert model.generate(second, 4).equal(text)
    with model.edit(hw.Redistribute("sinks:massive:1000", 0.2)):
        torch.testing.assert_close(model(ids, mask), before)


def test_massive_sinks_of_cross_attention_are_refused():
    model = hw.load(zoo.build("t5"))
    edit = hw.BiasKeys("sinks:massive", 1.0)
    with pytest.raises(EditError, match="of a stream of tokens, and cross-"), model.part("cross").edit(edit):
        pass


def test_rows_let_a_batch_run_many_variants(model):
    ids, _ = tiny_models.batch(6, (9,))
    edits = [hw.ScaleHeads({"1.1": 0.0}), hw.TowardUniform(0.5), hw.BiasKeys([0], 3.0), hw.AblateHeads("0.2"),
             hw.OffsetHeads({"2.2": [1.0] * 8}), hw.InjectPattern("previous", 0.7),
             hw.EditResidual(1, "add", [0.3] * 32),
             hw.Knockout(-1, [0]), hw.StreamingWindow(1, 2)]  # fmt: skip
    alone = torch.cat([edited(model, ids, edit) for edit in edits])
    with model.edit(*(dataclasses.replace(edit, rows=row) for row, edit in enumerate(edits))):
        together = model(ids.expand(len(edits), -1))
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    with (
        model.edit(hw.TowardUniform(0.5, rows=[4])),
        pytest.raises(EditError, match="no batch row 4 in a batch of 1"),
    ):
        model(ids)


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


SERIAL = [
    hw.OffsetHeads({"5.1": [0.5, 1.0]}), hw.TowardUniform(0.5, heads="5.1", rows=[0]),
    hw.InjectPattern({"keys": ["token:Mary", 0]}, 0.5, queries=-1), hw.InjectPattern([[1.0, 0.0], [0.5, 0.5]]),
    hw.BiasKeys(slice(0, 4), -2.0, heads=(5, 1)), hw.Normaliser("sigmoid", bias=-1.0), hw.HeavyHitters(4, 8),
    hw.MoveAttention("image", "text", 0.5, layers=[1]), hw.FreezeAttention("run.safetensors", 0.5),
    hw.EditResidual(1, "project_out", [1.0, 2.0], place="mid"), hw.EditMLP(0, "add", [[1.0], [2.0]], positions="sub"),
    hw.Emphasise("image", 0.7, queries=-1), hw.StreamingWindow(4, 10), hw.GroupedAttention(8, shift=4, sinks=2),
    hw.PositionInvariant([[0, 2], [2, 4]]),
    hw.Redistribute("sinks:act", where={"of": [1], "within": slice(1, 9), "most": 0.5, "least": 0.2}),
    hw.TowardIdentity(0.5, heads=np.array([3, 4])), hw.Temperature(2.0, heads=torch.tensor([[True, False]])),
    hw.ScaleHeads({Head(1, 2): 0.5}, rows=1), hw.AblateHeads([Head(0, 1)]), hw.Knockout("generated", ["image", 0]),
]  # fmt: skip


@pytest.mark.parametrize("edit", SERIAL, ids=lambda e: type(e).__name__)
def test_every_edit_survives_json_and_python(edit):
    read = hw.edit_from_dict(json.loads(json.dumps(edit.to_dict())))
    assert read == edit
    assert hash(read) == hash(edit)
    assert eval(edit.to_python(), {"hw": hw}) == edit
    assert read.to_python() == edit.to_python()
    if hasattr(edit, "rows"):
        assert dataclasses.replace(edit, rows=[7]) != edit
        assert "rows=[7]" in dataclasses.replace(edit, rows=[7]).to_python()


def test_every_edit_is_public_and_has_been_written_down():
    assert {type(edit) for edit in SERIAL} == set(EDITS.values())
    assert all(getattr(hw, name) is kind for name, kind in EDITS.items())


WRONG = [
    (lambda: hw.OffsetHeads({"1.1": [1.0] * 7}), "offset of head 1.1 must be 8 finite numbers"),
    (lambda: hw.OffsetHeads({"1.1": [float("nan")] * 8}), "NaN or infinite"),
    (lambda: hw.OffsetHeads(["1.1"]), "takes a mapping"),
    (lambda: hw.TowardUniform(-0.1), "amount must be between 0 and 1; got -0.1"),
    (lambda: hw.InjectPattern("previos"), "did you mean 'previous'"),
    (lambda: hw.InjectPattern([[1.0, -1.0]]), "not negative"),
    (lambda: hw.InjectPattern([1.0, 2.0]), "weights are .query, key."),
    (lambda: hw.InjectPattern(torch.ones(3, 2, 2)), ".4 heads, query, key.; got .3, 2, 2."),
    (lambda: hw.InjectPattern({"tokens": [1]}), "'keys': positions"),
    (lambda: hw.InjectPattern(lambda: 1), "a pattern is a name, a rule, a record"),
    (lambda: hw.Normaliser("softmx"), "Normaliser: unknown normaliser 'softmx'"),
    (lambda: hw.Normaliser("sinkhorn", iterations=2), "odd number of iterations"),
    (lambda: hw.BiasKeys("tokn:Mary", 1.0), "'tokn:Mary' is no name; write 'token:Mary'"),
    (lambda: hw.BiasKeys("images", 1.0), "did you mean 'image'"),
    (lambda: hw.BiasKeys("image", 1.0), "LlamaForCausalLM has no image tokens"),
    (lambda: hw.BiasKeys("sinks:spectre", 1.0), "found by the rules share, act, massive; got"),
    (lambda: hw.BiasKeys("sinks:gu:0.3", 1.0), "share on a text's first 64 tokens; write 'sinks:share'"),
    (lambda: hw.BiasKeys("sinks:spectral", 1.0), "find them once with find_sinks.record, rule='spectral'"),
    (lambda: hw.BiasKeys("sinks:massive:-1", 1.0), "is not a number above 0"),
    (lambda: hw.BiasKeys("sinks:act:much", 1.0), "is not a number above 0"),
    (lambda: hw.BiasKeys("", 1.0), "got ''"),
    (lambda: hw.BiasKeys({1: 2}, 1.0), "got {1: 2}"),
    (lambda: hw.BiasKeys([1], 1.0, rows="some"), "rows are 'all', a batch row"),
    (lambda: hw.MoveAttention("others", "others"), "can not both be 'others'"),
    (lambda: hw.MoveAttention([0, 1], [1, 2]), "positions .1. are both"),
    (lambda: hw.Redistribute([0], where={"of": [1]}), "where is a mapping with of, within, most, least"),
    (lambda: hw.StreamingWindow(4, 0), "window must be a whole number, 1 or more; got 0"),
    (lambda: hw.GroupedAttention(0), "size must be a whole number"),
    (lambda: hw.HeavyHitters(2.5, 3), "heavy must be a whole number"),
    (lambda: hw.FreezeAttention(3), "takes a record or the path of one"),
    (lambda: hw.FreezeAttention("/nowhere/run.safetensors"), "there is no file"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "message"), WRONG)
def test_a_wrong_edit_is_refused_in_one_line(model, make, message):
    with pytest.raises(hw.HeadwaterError, match=message) as caught:
        model.edit(make())
    assert "\n" not in str(caught.value)


def test_plain_forms_of_positions():
    assert positions.check(np.array([1, 2]), "x") == (1, 2) == positions.check(torch.tensor([1, 2]), "x")
    assert positions.check(range(3), "x") == (0, 1, 2)
    assert positions.of_row((1, slice(0, 2)), 5) == [1, 0, 1]
    assert positions.beyond(("token:a", 7, -9, 2), 5) == [7, -9]


@pytest.mark.parametrize("wrong", [["a", 2, 3], [0, 3, 0]])
def test_a_slice_of_other_things_than_numbers_is_refused(wrong):
    edit = hw.edit_from_dict({"edit": "Redistribute", "keys": {"slice": wrong}})
    with pytest.raises(EditError, match="Redistribute: keys: a slice is of whole numbers"):
        hw.load(tiny_models.tiny("gpt2")).edit(edit)
