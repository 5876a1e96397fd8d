"""Generation gives transformers' own tokens as they come, and refuses what it can not record."""

from __future__ import annotations

import hybrid_models
import pytest
import tiny_models
import torch

import headwater as hw
from headwater.lens.errors import PromptError, RecordError


def left_padded(lengths=(9, 5), seed=3):
    ids, _ = tiny_models.batch(seed, (max(lengths),) * len(lengths))
    mask = torch.stack([torch.arange(max(lengths)) >= max(lengths) - n for n in lengths]).long()
    return ids, mask


def by_hand(hf, ids, mask, count, end):
    """Greedy decoding without a cache, as one would write it down."""
    live = torch.ones(len(ids), dtype=torch.bool)
    for _ in range(count):
        places = (mask.cumsum(-1) - 1).clamp_min(0)
        with torch.no_grad():
            logits = hf(input_ids=ids, attention_mask=mask, position_ids=places, use_cache=False).logits[
                :, -1
            ]
        chosen = torch.where(live, logits.argmax(-1), 0)
        ids, mask = torch.cat([ids, chosen[:, None]], 1), torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        live &= chosen != end
        if not live.any():
            break
    return ids


@pytest.mark.parametrize("name", tiny_models.CAUSAL)
def test_without_edits_the_tokens_are_those_of_transformers(name):
    hf = tiny_models.tiny(name)
    ids, mask = left_padded()
    with torch.no_grad():
        own = hf.generate(
            input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=10, pad_token_id=0
        )
    model = hw.load(hf)
    told = []
    output, record = model.generate(ids, 10, mask, record=True, keep=(), on_token=told.append, pad_token_id=0)
    assert output.equal(own)
    assert model.generate(ids, 10, mask, pad_token_id=0).equal(own)
    assert torch.stack(told, 1).equal(own[:, ids.shape[1] :])
    assert record.tokens.equal(own)
    assert own.equal(by_hand(tiny_models.tiny(name), ids, mask, 10, 2))


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        ({"num_beams": 2}, PromptError, "num_beams=2"),
        ({"use_cache": False}, RecordError, "cache"),
        ({"cache_implementation": "static"}, RecordError, "cache_implementation='static'"),
        ({"keep_on": "tape"}, RecordError, "keep_on must be"),
        ({"path": "x.safetensors"}, RecordError, "keep_on='disk'"),
        ({"keep": ("q",)}, RecordError, "keep must be"),
    ],
)
def test_what_can_not_be_recorded_is_refused_by_name(options, kind, words):
    model = hw.load(tiny_models.tiny("gpt2"))
    ids, _ = tiny_models.batch(1, (6,))
    with pytest.raises(kind, match=words):
        model.generate(ids, 3, record=True, **options)


def test_text_comes_in_pieces_that_join_to_the_text():
    model = hw.load("tasks-4l")
    prompt = "When Mary and John went to the store , John gave a drink to"
    pieces = []
    text, record = model.generate(prompt, 5, record=True, on_token=pieces.append)
    assert text.startswith(prompt)
    assert text == model.generate(prompt, 5)
    assert "".join(pieces).split() == text[len(prompt) :].split()
    assert len(record.strings[0]) == record.tokens.shape[1]
    rows = []
    model.generate([prompt, "Mary and John went to"], 3, on_token=rows.append)
    assert [len(row) for row in rows] == [2, 2, 2]


def test_a_caller_that_raises_leaves_no_file(tmp_path):
    model = hw.load(tiny_models.tiny("gpt2"))
    ids, _ = tiny_models.batch(1, (6,))

    def stop(token):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model.generate(ids, 3, record=True, keep_on="disk", path=tmp_path / "x.safetensors", on_token=stop)
    assert list(tmp_path.iterdir()) == []
    assert model.record(ids).layers == [0, 1, 2]


@pytest.mark.parametrize("name", tiny_models.CAUSAL)
@pytest.mark.parametrize("padded", [False, True])
def test_greedy_generation_is_transformers_own(name, padded):
    reference = tiny_models.tiny(name)
    model = hw.load(tiny_models.tiny(name))
    ids, _ = tiny_models.batch(4)
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :5] = 0
    expected = reference.generate(
        ids, attention_mask=mask, max_new_tokens=12, do_sample=False, pad_token_id=0
    )
    assert model.generate(ids, 12, attention_mask=mask).equal(expected)


@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        (
            "RecurrentGemmaForCausalLM",
            {"lru_width": 32, "block_types": ["recurrent", "attention"], "attention_window_size": 4},
        ),
        (
            "Gemma4ForCausalLM",
            {
                "head_dim": 8, "global_head_dim": 16, "layer_types": ["sliding_attention", "full_attention"] * 2,
                "sliding_window": 4, "num_kv_shared_layers": 2, "hidden_size_per_layer_input": 8,
                "vocab_size_per_layer_input": 97,
            },
        ),
    ],
)  # fmt: skip
def test_a_row_behind_padding_is_generated_and_recorded_as_alone(kind, shape):
    model = hw.load(hybrid_models.built(kind, **shape))
    ids = torch.randint(3, 60, (2, 10), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0  # the ids at these positions are no padding tokens
    made, record = model.generate(ids, attention_mask=mask, max_new_tokens=8, min_new_tokens=8, record=True)
    alone = model.generate(ids[1:, 4:], max_new_tokens=8, min_new_tokens=8)
    assert made[1:, 4:].equal(alone)
    whole = model.record(alone)
    for layer in record.layers:
        found, expected = record.pattern(layer)[1, :, 4:, 4:], whole.pattern(layer)[0]
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
