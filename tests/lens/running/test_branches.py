"""Decoding against a second run is what two runs without a cache give, combined by hand at every step."""

from __future__ import annotations

import math

import pytest
import tiny_models
import torch

import headwater as hw
from headwater.lens.errors import PromptError
from headwater.lens.loading import zoo


def by_hand(model, plain, other, weight, beta, count, on=(), off=(), choose=None):
    """Ids and scores of both runs without a cache; `plain` and `other` are keyword arguments of the model."""
    scores = []
    for _ in range(count):
        with model.edit(*on):
            first = model(**plain)[:, -1].float()
        with model.edit(*off):
            second = model(**other)[:, -1].float()
        found = (1 + weight) * first - weight * second
        found[first.softmax(-1) < beta * first.softmax(-1).amax(-1, keepdim=True)] = -math.inf
        scores.append(found)
        new = found.argmax(-1, keepdim=True) if choose is None else choose(found)
        plain, other = (_longer(each, new) for each in (plain, other))
    return plain["given"], torch.stack(scores)


def _longer(run, new):
    mask = run["attention_mask"]
    longer = {
        "given": torch.cat([run["given"], new], 1),
        "attention_mask": torch.cat([mask, mask[:, :1] | 1], 1),
    }
    return run | longer


def pictured(lengths=(9, 9)):
    hf = zoo.build("llava")
    hf.generation_config.eos_token_id = None
    given = zoo.inputs("llava", lengths=lengths)
    return hw.load(hf), {"given": given.pop("input_ids"), **given}


def same(model, run, branch, count, hand, on=()):
    with model.edit(*on):
        made = model.generate(
            **run, max_new_tokens=count, against=branch, output_scores=True, return_dict_in_generate=True
        )
    ids, scores = hand
    assert made.sequences.equal(ids)
    torch.testing.assert_close(torch.stack(made.scores), scores, atol=1e-4, rtol=1e-4)


def test_other_edits_beside_a_picture():
    model, run = pictured()
    hidden = [hw.Knockout("all", slice(4, 12))]
    on = [hw.Temperature(0.5, layers=1)]
    branch = hw.Branch(hidden, weight=1.5, plausible=0.1)
    same(model, run, branch, 4, by_hand(model, run, run, 1.5, 0.1, 4, on, hidden), on)


def test_another_picture():
    model, run = pictured()
    other = run | {"pixel_values": run["pixel_values"].flip(-1) + 1}
    branch = hw.Branch(weight=0.5, inputs={"pixel_values": other["pixel_values"]})
    same(model, run, branch, 3, by_hand(model, run, other, 0.5, 0.0, 3))


def test_a_prompt_of_another_length_behind_padding():
    hf = tiny_models.tiny("llama")
    hf.generation_config.eos_token_id = None
    model = hw.load(hf)
    ids, _ = tiny_models.batch(3, (9, 9))
    mask = (torch.arange(9) >= torch.tensor([[0], [3]])).long()
    run = {"given": ids, "attention_mask": mask}
    other = {"given": ids[:, 4:], "attention_mask": torch.ones_like(ids[:, 4:])}
    branch = hw.Branch(prompt=ids[:, 4:], weight=0.7, plausible=0.2)
    same(model, run, branch, 4, by_hand(model, run, other, 0.7, 0.2, 4))


def test_rows_that_padding_moves_are_decoded_one_by_one():
    hf = tiny_models.tiny("gptoss")
    hf.generation_config.eos_token_id = None
    model = hw.load(hf)
    ids, mask = tiny_models.batch(2, (7, 4))  # right padding: new tokens stand behind each row
    branch = hw.Branch([hw.Temperature(0.3)], weight=0.9)
    made = model.generate(ids, 3, mask, against=branch)
    alone = model.generate(ids[1:, :4], 3, against=branch)
    assert made[1, -7:].equal(alone[0])


def test_positions_by_name_are_those_of_each_run():
    model = hw.load("tasks-4l")
    text = "When Mary and John went to the store , John gave a drink to"
    tokens = model.to_tokens(text)
    run = {"given": tokens.ids, "attention_mask": torch.ones_like(tokens.ids)}
    shorter = {"given": tokens.ids[:, 3:], "attention_mask": torch.ones_like(tokens.ids[:, 3:])}
    on, off = [hw.BiasKeys("token:Mary", -3.0)], [hw.BiasKeys("token:John", -9.0)]
    branch = hw.Branch(off, prompt=shorter["given"], weight=0.4)
    same(model, run, branch, 3, by_hand(model, run, shorter, 0.4, 0.0, 3, on, off), on)


def test_sampling_draws_from_the_combined_scores():
    model, run = pictured()
    off = [hw.TowardIdentity(1.0)]

    def draw(scores):
        return torch.multinomial(scores.div(0.8).softmax(-1), 1)

    torch.manual_seed(7)
    ids, _ = by_hand(model, run, run, 1.0, 0.01, 4, off=off, choose=draw)
    torch.manual_seed(7)
    branch = hw.Branch(off, weight=1.0, plausible=0.01)
    assert model.generate(
        **run, max_new_tokens=4, against=branch, do_sample=True, temperature=0.8, top_k=0
    ).equal(ids)


def test_an_encoder_keeps_its_text():
    hf = zoo.build("t5")
    hf.generation_config.eos_token_id = None
    model, given = hw.load(hf), zoo.inputs("t5", lengths=(8, 8))
    run = {"given": given["input_ids"]}
    off = [hw.Temperature(0.2)]
    made = model.generate(
        **run, max_new_tokens=3, against=hw.Branch(off), output_scores=True, return_dict_in_generate=True
    )
    for step in range(3):
        start = made.sequences[:, : step + 1]
        first = model(**run, decoder_input_ids=start)[:, -1].float()
        with model.edit(*off):
            second = model(**run, decoder_input_ids=start)[:, -1].float()
        torch.testing.assert_close(made.scores[step], 2 * first - second, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(first, second, atol=1e-3)


def test_the_record_and_the_pieces_are_of_the_first_run():
    model, run = pictured((9,))
    branch = hw.Branch([hw.Knockout("all", slice(2, 6))], weight=2.0)
    pieces = []
    on = hw.Temperature(0.5, layers=0)
    with model.edit(on):
        ids, record = model.generate(
            **run,
            max_new_tokens=3,
            against=branch,
            record=True,
            keep=("qk", "residual"),
            on_token=pieces.append,
        )
        whole = model.record(ids, pixel_values=run["pixel_values"], keep=("qk", "residual"))
    assert torch.stack(pieces, 1).equal(ids[:, -3:])
    for layer in record.layers:
        torch.testing.assert_close(record.pattern(layer), whole.pattern(layer), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(record.residual(layer), whole.residual(layer), atol=1e-4, rtol=1e-4)
    assert model.edits == ()


def test_a_weight_of_zero_is_the_plain_run_and_leaves_nothing_behind():
    model, run = pictured()
    plain = model.generate(**run, max_new_tokens=4)
    branch = hw.Branch([hw.Knockout("all", slice(0, 9))], weight=0.0)
    assert model.generate(**run, max_new_tokens=4, against=branch).equal(plain)
    assert not model.generate(**run, max_new_tokens=4, against=hw.Branch(branch.edits, weight=9.0)).equal(
        plain
    )
    assert model.generate(**run, max_new_tokens=4).equal(plain)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"against": [hw.Temperature(0.5)]}, r"against takes hw.Branch"),
        ({"against": hw.Branch(), "num_beams": 2}, "num_beams=2"),
        ({"against": hw.Branch(), "prompt_lookup_num_tokens": 2}, "prompt_lookup_num_tokens"),
        ({"against": hw.Branch(prompt=[[1, 5, 6], [1, 5, 7]])}, "2 prompts for 1"),
    ],
)
def test_what_no_second_run_can_follow_is_refused(options, words):
    model = hw.load(tiny_models.tiny("llama"))
    with pytest.raises(PromptError, match=words):
        model.generate([[1, 5, 9]], 2, **options)


@pytest.mark.parametrize(
    "numbers", [{"weight": -1.0}, {"weight": math.nan}, {"plausible": 1.5}, {"edits": "all"}]
)
def test_numbers_without_a_meaning_are_refused(numbers):
    with pytest.raises(PromptError, match="Branch"):
        hw.Branch(**numbers)
