"""Models of several parts: encoder, decoder and cross maps, image towers, token groups, and edits of one part alone.

Which tokens stand on which side of a map is said by `axes.py`, and what the parts share by `opened.py`. Seen to fail:
the rows of cross-attention placed by the encoder's padding (of equal length here), the query offset of a decoding step
left at 0, query positions counted by the encoder's padding, rows of decoder padding kept, frames of sound taken for
keys one by one.
"""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from part_oracle import PartOracle

import headwater as hw
from headwater.lens.errors import EditError, ModelError, PromptError, RecordError
from headwater.lens.loading import zoo

PAIRS = ("t5", "bart")


def pair(name):
    dense = zoo.build(name)
    return hw.load(copy.deepcopy(dense)), dense


def lopsided(name="t5"):
    """Encoder and decoder of the same length, padded in different rows: a mask taken from the wrong side shows.

    BART counts positions from the first column, so that its texts are padded on the right alone.
    """
    generator = torch.Generator().manual_seed(3)
    ids, target = (torch.randint(3, 90, (3, 9), generator=generator) for _ in range(2))
    mask, target_mask = torch.ones(3, 9, dtype=torch.long), torch.ones(3, 9, dtype=torch.long)
    mask[0, 6:], target_mask[2, 5:] = 0, 0
    mask[1, slice(7, None) if name == "bart" else slice(2)] = 0
    return ids, mask, {"decoder_input_ids": target, "decoder_attention_mask": target_mask}


def of_part(model, oracle, name):
    """Layer → the oracle's weights [batch, head, query, key]."""
    paths = {module: path for path, module in model.hf.named_modules()}
    part = model.part(name)
    return {layer: oracle.maps[paths[part.attention_module(layer)]] for layer in part.layers}


@pytest.mark.parametrize("name", PAIRS)
def test_encoder_decoder_and_cross_maps_under_padding(name):
    model, dense = pair(name)
    ids, mask, more = lopsided(name)
    oracle = PartOracle()
    expected = oracle.run(dense, lambda m: m(input_ids=ids, attention_mask=mask, **more)).logits
    rows = more["decoder_attention_mask"].bool()
    torch.testing.assert_close(model(ids, mask, **more)[rows], expected[rows], atol=5e-6, rtol=1e-4)
    record = model.record(ids, mask, **more)
    valid = {"decoder": rows, "encoder": mask.bool(), "cross": rows}
    for name_of, part in {"decoder": record, **record.parts}.items():
        assert part.valid.equal(valid[name_of])
        for layer, (weights,) in of_part(model, oracle, name_of).items():
            weights = weights * part.valid[:, None, :, None]
            torch.testing.assert_close(part.pattern(layer).double(), weights, atol=2e-6, rtol=1e-4)
            place = part.layers.index(layer)
            received = torch.from_numpy(part.statistic("received").values)[:, place].double()
            torch.testing.assert_close(received, weights.sum(-2), atol=1e-5, rtol=1e-4)
            seen = torch.from_numpy(part.statistic("visible").values)[:, place]
            assert seen.equal((weights > 0).sum(-2))
    cross = record.part("cross")
    assert cross.tokens.equal(more["decoder_input_ids"])
    assert cross.keys.tokens.equal(ids)
    assert cross.keys.valid.equal(mask.bool())
    assert cross.statistic("received").coords["token"].values[0, 0] == f"#{ids[0, 0]}"
    assert cross.statistic("entropy").coords["token"].values[0, 0] == f"#{more['decoder_input_ids'][0, 0]}"


@pytest.mark.parametrize("name", PAIRS)
def test_an_edit_of_cross_attention_counts_real_tokens_of_either_side(name):
    model, dense = pair(name)
    ids, mask, more = lopsided(name)
    first, last = mask.argmax(-1), 8 - mask.flip(-1).argmax(-1)
    end = more["decoder_attention_mask"].sum(-1) - 1

    def knocked(path, call, scores):
        if "EncDec" in path or "encoder_attn" in path:
            for row in range(3):
                scores[row, :, end[row], first[row]] = -torch.inf
                scores[row, :, end[row], last[row]] = -torch.inf
        return scores

    oracle = PartOracle(knocked)
    expected = oracle.run(dense, lambda m: m(input_ids=ids, attention_mask=mask, **more)).logits
    rows = more["decoder_attention_mask"].bool()
    with model.part("cross").edit(hw.Knockout(queries=[-1], keys=[0, -1])):
        found = model(ids, mask, **more)
        record = model.part("cross").record(ids, mask, **more)
    torch.testing.assert_close(found[rows], expected[rows], atol=5e-6, rtol=1e-4)
    for layer, (weights,) in of_part(model, oracle, "cross").items():
        weights = weights * rows[:, None, :, None]
        torch.testing.assert_close(record.pattern(layer).double(), weights, atol=2e-6, rtol=1e-4)
    assert model(ids, mask, **more).sub(found)[rows].abs().max() > 1e-4


@pytest.mark.parametrize("name", [*PAIRS, "whisper"])
def test_an_edit_at_one_decoder_position_acts_at_that_step_of_generation(name):
    model, dense = pair(name)
    given = zoo.inputs(name)
    given.pop("decoder_input_ids", None)
    settings = {
        "max_new_tokens": 5,
        "min_new_tokens": 5,
        "do_sample": False,
        "pad_token_id": 0,
        "eos_token_id": 2,
    }

    def knocked(path, call, scores):
        if call == 2 and ("EncDec" in path or ".encoder_attn" in path):
            scores[..., 1:4] = -torch.inf
        return scores

    expected = PartOracle(knocked).run(
        dense, lambda m: m.generate(**given, **settings, output_scores=True, return_dict_in_generate=True)
    )
    with torch.no_grad(), model.part("cross").edit(hw.Knockout(queries=[2], keys=[1, 2, 3])):
        found = model.hf.generate(**given, **settings, output_scores=True, return_dict_in_generate=True)
    assert found.sequences.equal(expected.sequences)
    for a, b in zip(found.scores, expected.scores, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)
    with torch.no_grad():
        plain = model.hf.generate(**given, **settings, output_scores=True, return_dict_in_generate=True)
    moved = [
        float((a - b).abs().nan_to_num(0.0).max()) for a, b in zip(found.scores, plain.scores, strict=True)
    ]
    assert moved[:2] == [0.0, 0.0]
    assert moved[2] > 1e-5


def test_what_cross_attention_can_not_be_asked():
    model, _ = pair("t5")
    ids, mask, more = lopsided()
    cross = model.part("cross")
    with pytest.raises(RecordError, match="'self' is not defined in cross-attention"):
        cross.record(ids, mask, statistics=("self",), **more)
    with pytest.raises(EditError, match="TowardIdentity has no meaning in cross-attention"):
        cross.edit(hw.TowardIdentity(0.5))
    with pytest.raises(ModelError, match="has no part 'crosss': did you mean 'cross'"):
        model.part("crosss")
    with pytest.raises(RecordError, match="has no part 'vision'"):
        model.record(ids, mask, **more).part("vision")
    with pytest.raises(EditError, match="no position 9 in a prompt of 9"), cross.edit(hw.Knockout([0], [9])):
        model(ids, mask, **more)
    with pytest.raises(PromptError, match="the encoder reads 3 rows and the decoder 1"):
        model(ids, mask, decoder_input_ids=[[4, 5]])
    with pytest.raises(PromptError, match="reads no 'pixel_values'"):
        model(ids, mask, pixel_values=torch.zeros(1))


def test_the_parts_of_a_model_travel_with_it():
    model, _ = pair("bart")
    ids, mask, more = lopsided("bart")
    twin = pickle.loads(pickle.dumps(model))
    assert twin(ids, mask, **more).equal(model(ids, mask, **more))
    with model.part("encoder").edit(hw.Temperature(0.0)):
        assert not twin(ids, mask, **more).equal(model(ids, mask, **more)), "a copy carries no edits"
    with model.part("encoder").edit(hw.Temperature(0.0)), model.part("cross").edit(hw.Temperature(0.0)):
        uniform = model.record(ids, mask, **more)
    weights = uniform.part("cross").pattern(0)
    torch.testing.assert_close(weights[0, :, :, :6], torch.full((4, 9, 6), 1 / 6))
    assert uniform.pattern(0)[0, :, 8].std() > 1e-4, "the decoder's own attention is not edited"


def test_without_decoder_tokens_the_decoder_reads_its_start_alone():
    model, dense = pair("t5")
    ids, mask, _ = lopsided()
    start = torch.zeros(3, 1, dtype=torch.long)
    expected = dense(input_ids=ids, attention_mask=mask, decoder_input_ids=start).logits
    torch.testing.assert_close(model(ids, mask), expected, atol=5e-6, rtol=1e-4)


def test_sound_is_read_and_its_frames_are_keys():
    model, dense = pair("whisper")
    given = zoo.inputs("whisper")
    sound, target = given["input_features"], given["decoder_input_ids"]
    expected = dense(**given).logits
    for read in (model(sound, decoder_input_ids=target), model(target, input_features=sound)):
        torch.testing.assert_close(read, expected, atol=5e-6, rtol=1e-4)
    record = model.record(sound, decoder_input_ids=target)
    assert record.part("cross").map(0).shape == (2, 4, 7, zoo.FRAMES // 2)
    assert record.part("encoder").strings[0][:2] == ["#0", "#1"]
    assert record.part("cross").keys.valid.shape == (2, zoo.FRAMES // 2)
    assert record.part("cross").to_xarray()["received"].shape == (2, 2, 4, zoo.FRAMES // 2)
    with pytest.raises(PromptError, match="give input_features="):
        model(target)
    with pytest.raises(PromptError, match="holds NaN"):
        model(sound * torch.nan, decoder_input_ids=target)


def test_a_part_says_what_it_is_in_one_line():
    model, _ = pair("bart")
    assert repr(model.parts["cross"]) == "Part('cross', 2 layers × 4 heads, of decoder × encoder)"
