"""Texts behind and before padding, held to the same texts alone.

Seen to fail: no comparison on load, texts generated behind padding by a model that it moves.
"""

from __future__ import annotations

from typing import Any

import pytest
import small_tokenizers
import torch
import transformers

import headwater as hw
from headwater.lens.errors import PromptError

SHAPE: dict[str, Any] = {
    "vocab_size": 97, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
BART = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "decoder_start_token_id": 2, "forced_eos_token_id": None,
}  # fmt: skip
BERT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
TEXTS = ["w5 w6 w7 w8 w9", "w11 w12"]


def made(kind: str, **more: Any) -> Any:
    torch.manual_seed(0)
    family = getattr(transformers, kind)
    hf = family(family.config_class(**{**SHAPE, **more})).eval()
    with torch.no_grad():
        for name, weight in hf.named_parameters():
            if weight.dim() == 2:
                weight.mul_(10 if "embed_positions" in name else 4)
    return hw.load(hf, small_tokenizers.words())


@pytest.fixture(scope="module")
def bart():
    return made("BartForCausalLM", **BART)


def test_positions_from_the_first_column(bart):
    assert bart.moved_by_padding == {("text", "left")}
    ids, mask = torch.tensor([[0, 0, 0, 0, 5, 6, 7]]), torch.tensor([[0, 0, 0, 0, 1, 1, 1]])
    for run in (bart, bart.record, bart.loss, bart.head_outputs):
        with pytest.raises(
            PromptError, match=r"padding on the left changes what .*; give the rows one by one, or pad"
        ):
            run(ids, mask)
    for side in ("left", "right"):
        tokens = bart.to_tokens(TEXTS, side=side)
        assert tokens.mask.tolist() == [[True] * 5, [True, True, False, False, False]]
        torch.testing.assert_close(bart(tokens)[1, :2], bart(TEXTS[1])[0], atol=1e-5, rtol=1e-4)


def test_texts_are_generated_as_alone(bart):
    alone = [bart.generate(text, 6) for text in TEXTS]
    assert bart.generate(TEXTS, 6) == alone
    ids = bart.generate(
        torch.tensor([[5, 6, 7, 8, 9], [0, 0, 0, 11, 12]]), 4, torch.tensor([[1] * 5, [0, 0, 0, 1, 1]])
    )
    assert ids.shape == (2, 9)
    assert ids[1, :3].tolist() == [0, 0, 0]
    assert ids[1, 3:].tolist() == bart.generate(torch.tensor([[11, 12]]), 4)[0].tolist()
    assert bart.generate([TEXTS[0]] * 2, 2, record=True).record.tokens.shape == (2, 7)
    with pytest.raises(PromptError, match="record and on_token take texts of equal length"):
        bart.generate(TEXTS, 2, record=True)


def test_an_encoder_with_learned_positions():
    model = made("BartForConditionalGeneration", **BART)
    assert model.moved_by_padding == {("encoder", "left"), ("decoder", "left")}
    assert model.generate(TEXTS, 6) == [model.generate(text, 6) for text in TEXTS]
    start = {"decoder_input_ids": ["w20 w21 w22", "w30"]}
    alone = [
        model.generate(t, 4, decoder_input_ids=[d])
        for t, d in zip(TEXTS, start["decoder_input_ids"], strict=True)
    ]
    assert model.generate(TEXTS, 4, **start) == alone
    with pytest.raises(PromptError, match="padding on the left changes what"):
        model(torch.tensor([[0, 5, 6]]), torch.tensor([[0, 1, 1]]))


def test_a_class_that_is_read_in_the_first_column():
    model = made("BertForSequenceClassification", **BERT)
    assert model.moved_by_padding == {("text", "left")}
    torch.testing.assert_close(model(TEXTS)[1], model(TEXTS[1])[0], atol=1e-5, rtol=1e-4)
    with pytest.raises(PromptError, match="padding on the left"):
        model(torch.tensor([[0, 5, 6]]), torch.tensor([[0, 1, 1]]))


@pytest.mark.parametrize("kind", ["BertForMaskedLM", "LlamaForCausalLM", "LlamaForSequenceClassification"])
def test_others_are_padded_on_either_side(kind):
    model = made(kind, **BERT)
    assert model.moved_by_padding == frozenset()
    for side in ("left", "right"):
        tokens = model.to_tokens(TEXTS, side=side)
        found, alone = model(tokens), model(TEXTS[1])
        found = found[1][tokens.mask[1]] if found.dim() == 3 else found[1]
        torch.testing.assert_close(found, alone[0], atol=1e-5, rtol=1e-4)
