"""A mask of pairs in `record`, `loss` and analyses, against transformers' own weights; refused where it has no meaning.

Seen to fail: hidden pairs that count as visible, the rows of a batch given the mask of the first, a mask that is all
ones taken away, a causal mask of zeros and minus infinity not seen to be a band.
"""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from comparison import close, near

import headwater as hw
from headwater.lens.errors import PromptError
from headwater.lens.loading import zoo

IDS = torch.tensor([[5, 9, 11, 7, 20, 8, 6], [3, 4, 12, 13, 21, 9, 30]])
N = IDS.shape[1]
CAUSAL = torch.ones(N, N).tril() > 0
SHOWN = (torch.rand(2, 1, N, N, generator=torch.Generator().manual_seed(0)) < 0.6) | (torch.eye(N) > 0)
LEAST = torch.finfo(torch.float32).min


def added(shown: torch.Tensor) -> torch.Tensor:
    return torch.zeros(shown.shape).masked_fill(~shown, LEAST)


def eager(name: str, shown: torch.Tensor):
    model = copy.deepcopy(zoo.build(name))
    model.set_attn_implementation("eager")
    with torch.no_grad():
        return model(input_ids=IDS, attention_mask=added(shown), output_attentions=True)


@pytest.mark.parametrize("name", ["llama", "gemma3", "bert"])
def test_a_record_has_the_weights_that_transformers_gives_under_the_mask(name, tmp_path):
    shown = SHOWN if name == "bert" else SHOWN & CAUSAL
    model, expected = hw.load(zoo.build(name)), eager(name, shown)
    for mask in (shown, added(shown), shown.long(), shown.numpy()):
        record = model.record(IDS, mask)
        for weights, layer in zip(expected.attentions, record.layers, strict=True):
            close(record.pattern(layer), weights)
    seen = record.statistic("visible").sel(layer=0).values
    assert (seen == shown.sum(2).expand(2, model.n_heads, N).numpy()).all()
    record.save(tmp_path / "x.safetensors")
    assert hw.Record.open(tmp_path / "x.safetensors").pattern(1).equal(record.pattern(1))


def test_one_mask_for_all_rows_and_masks_that_are_a_band_or_nothing():
    model = hw.load(zoo.build("llama"))
    one = SHOWN[0, 0] & CAUSAL
    expected = eager("llama", one.expand(2, 1, N, N))
    close(model.record(IDS, one).pattern(0), expected.attentions[0])
    plain, causal = model.record(IDS), model.record(IDS, CAUSAL[None, None])
    assert causal.pattern(1).equal(plain.pattern(1))
    assert causal.map(0).mask.right == 0
    assert causal.map(0).mask.extra is None
    everything = torch.ones(1, 1, N, N) > 0  # of a causal model: it looks ahead
    close(
        model.record(IDS, everything).pattern(0), eager("llama", everything.expand(2, 1, N, N)).attentions[0]
    )


def test_numbers_that_are_added_stay_a_bias():
    model = hw.load(zoo.build("llama"))
    generator = torch.Generator().manual_seed(1)
    bias = added(CAUSAL[None, None]) - torch.rand(1, 1, N, N, generator=generator) * CAUSAL
    dense = copy.deepcopy(zoo.build("llama"))
    dense.set_attn_implementation("eager")
    with torch.no_grad():
        expected = dense(input_ids=IDS, attention_mask=bias, output_attentions=True).attentions
    close(model.record(IDS, bias).pattern(1), expected[1])


def test_losses_and_analyses_take_it_and_rows_keep_their_own():
    model = hw.load(zoo.build("llama"))
    shown = SHOWN & CAUSAL
    tokens = model.to_tokens(IDS, shown)
    close(model(tokens), eager("llama", shown).logits)
    importance = hw.analyses.head_importance(model, tokens)
    each = [
        hw.analyses.head_importance(model, model.to_tokens(IDS[n : n + 1], shown[n : n + 1]))
        for n in range(2)
    ]
    near(torch.tensor(importance.values), torch.tensor((each[0].values + each[1].values) / 2), 1e-4)
    plain = hw.analyses.head_importance(model, IDS)
    assert np.abs(importance.values - plain.values).max() > 1e-3


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (SHOWN[:, :, :3], r"\[query, key\]; got \[2, 1, 3, 7\]"),
        (SHOWN.float(), "give a bool mask otherwise"),
        (SHOWN.long() * 2, "holds 1 where visible and 0 where hidden"),
    ],
)
def test_a_mask_that_could_mean_something_else_is_refused(mask, message):
    with pytest.raises(PromptError, match=message):
        hw.load(zoo.build("llama")).record(IDS, mask)


def test_it_is_refused_where_it_has_no_meaning():
    with pytest.raises(PromptError, match=r"generate under the edit hw\.MaskPairs"):
        hw.load(zoo.build("llama")).generate(IDS, 2, SHOWN)
    with pytest.raises(PromptError, match="reads two texts"):
        hw.load(zoo.build("t5")).record(IDS, SHOWN)
