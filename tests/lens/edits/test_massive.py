"""Redistribution from massive tokens against the authors' loop, run by transformers with float64 weights."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from deep_chat import IMAGE, deep_llava
from transformers.integrations.sdpa_attention import repeat_kv
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import headwater as hw
from headwater.lens.errors import EditError
from headwater.lens.loading import zoo

LAYERS = (1, 2, 3)


@pytest.fixture(scope="module")
def chat():
    return hw.load(deep_llava().double()), copy.deepcopy(deep_llava().double())


class ByHand:
    """VAR as its authors wrote it (logic.py of VisAttnSink): row by row, one prompt, sinks of the prompt's own run."""

    def __init__(self, hf, dimensions, tau, rho, least, p):
        self.settings = dimensions, tau, rho, least, p
        self.sinks: dict[int, list[int]] = {}
        self.moved = 0
        self.hooks = [
            layer.register_forward_pre_hook(self.find, with_kwargs=True)
            for layer in hf.model.language_model.layers
        ]

    def find(self, layer, args, kwargs):
        stream, number = args[0][0], layer.self_attn.layer_idx
        if number in LAYERS and len(stream) > 1:  # the prompt
            sizes = (stream / (stream.square().mean(-1, keepdim=True) + 1e-6).sqrt()).abs()
            self.sinks[number] = [
                n for n, size in enumerate(sizes) if max(size[d] for d in self.settings[0]) > self.settings[1]
            ]

    def attend(self, module, q, k, v, mask, scaling, **_):
        k, v = (repeat_kv(x, module.num_key_value_groups) for x in (k, v))
        scores = q @ k.mT * scaling
        offset = k.shape[2] - q.shape[2]
        hidden = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).triu(offset + 1)
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        self.redistribute(weights[0], self.sinks.get(module.layer_idx, []), offset)
        return (weights @ v).transpose(1, 2), weights

    def redistribute(self, weights, massive, offset):
        _, _, rho, least, p = self.settings
        visual = [n for n in massive if n in IMAGE]
        fed = [n for n in IMAGE if n not in visual]
        if not visual or not fed:
            return
        for head in weights:
            for place, row in enumerate(head):
                image = row[list(IMAGE)].sum()
                if place + offset <= IMAGE[-1] or image < least or row[visual].sum() / (image + 1e-6) > rho:
                    continue
                self.moved += 1
                budget, share = (1 - p) * row[massive].sum(), row[fed] / row[fed].sum()
                row[massive] *= p
                row[fed] += budget * share


def by_hand(hf, given, ids_after, **settings):
    """Logits of a prompt and of tokens after it, read one by one from the cache, and the loop that made them."""
    loop = ByHand(hf, **settings)
    name = "by_hand"
    ALL_ATTENTION_FUNCTIONS[name] = loop.attend
    ALL_MASK_ATTENTION_FUNCTIONS[name] = ALL_MASK_ATTENTION_FUNCTIONS["eager"]
    try:
        hf.model.language_model.set_attn_implementation(name)
        found = hf(**given, use_cache=True)
        logits, cache = [found.logits[0]], found.past_key_values
        for token in ids_after:
            found = hf(input_ids=torch.tensor([[token]]), past_key_values=cache, use_cache=True)
            logits.append(found.logits[0])
    finally:
        for hook in loop.hooks:
            hook.remove()
        hf.model.language_model.set_attn_implementation("eager")
    return torch.cat(logits), loop


def prompt(seed):
    given = zoo.inputs("llava", seed, lengths=(11,))
    return {"input_ids": given["input_ids"], "pixel_values": given["pixel_values"].double()}


@torch.no_grad()
@pytest.mark.parametrize("seed", [0, 1, 2, 4])
def test_it_is_the_authors_loop_for_a_prompt_and_for_what_is_read_behind_it(chat, seed):
    model, hf = chat
    rng, given = random.Random(seed), prompt(seed)
    settings = {
        "dimensions": rng.sample(range(model.d_model), 3), "tau": rng.choice([1.2, 1.4]), "p": rng.choice([0.0, 0.6]),
        "rho": rng.choice([0.5, 1.0]), "least": rng.choice([0.0, 0.3]),
    }  # fmt: skip
    after = [5, 17, 9]
    expected, loop = by_hand(hf, given, after, **settings)
    assert loop.moved
    edit = hw.RedistributeMassive(
        settings["dimensions"],
        settings["p"],
        settings["tau"],
        settings["rho"],
        settings["least"],
        layers=LAYERS,
    )
    with model.edit(edit):
        found = model.hf(**given, use_cache=True)
        logits, cache = [found.logits[0]], found.past_key_values
        for token in after:
            found = model.hf(input_ids=torch.tensor([[token]]), past_key_values=cache, use_cache=True)
            logits.append(found.logits[0])
    torch.testing.assert_close(torch.cat(logits), expected, atol=3e-6, rtol=1e-5)
    assert not torch.allclose(expected, hf(**given).logits[0, -1], atol=1e-3)


@torch.no_grad()
def test_sinks_of_the_edited_run_differ_from_those_of_the_plain_one(chat):
    _, hf = chat
    given, settings = prompt(0), {"dimensions": [3, 4], "tau": 1.6, "rho": 1.0, "least": 0.0, "p": 0.0}
    _, edited = by_hand(hf, given, [], **settings)
    _, plain = by_hand(hf, given, [], **settings | {"p": 1.0})
    assert edited.sinks[1] == plain.sinks[1]
    assert edited.sinks != plain.sinks


@torch.no_grad()
def test_each_row_of_a_batch_has_its_own_sinks_and_image(chat):
    model, _ = chat
    edit = hw.RedistributeMassive([3, 4], 0.0, 1.6, 1.0, 0.0, layers=LAYERS)
    given = zoo.inputs("llava", 1, lengths=(11, 8))
    given["pixel_values"] = given["pixel_values"].double()
    with model.edit(edit):
        both = model(
            given["input_ids"], attention_mask=given["attention_mask"], pixel_values=given["pixel_values"]
        )
        for row, length in enumerate((20, 17)):
            alone = model(
                given["input_ids"][row : row + 1, :length], pixel_values=given["pixel_values"][row : row + 1]
            )
            torch.testing.assert_close(both[row, :length], alone[0], atol=3e-6, rtol=1e-5)


def test_what_does_not_fit_is_refused(chat):
    model, _ = chat
    with (
        pytest.raises(EditError, match="dimensions are numbers from 0 to"),
        model.edit(hw.RedistributeMassive([99])),
    ):
        pass
    with (
        pytest.raises(EditError, match="no image tokens, so it has no group 'image'"),
        hw.load("tasks-4l").edit(hw.RedistributeMassive([0])),
    ):
        pass
    found = model.hf(**prompt(0), use_cache=True)
    with (
        pytest.raises(EditError, match="begin with the prompt"),
        model.edit(hw.RedistributeMassive([0], image=slice(2, 11))),
    ):
        model.hf(input_ids=torch.tensor([[5]]), past_key_values=found.past_key_values, use_cache=True)
