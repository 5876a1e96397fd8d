"""A stack that reads queries of its own is a part of its own, whatever its modules are called.

Seen to fail where the name in a module's path decides which tokens its maps are of.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import transformers

import headwater as hw
from headwater.lens.models.part_axes import axes_of, own_name


def blip2() -> Any:
    """A random BLIP-2, whose Q-Former reads five queries of its own."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    config = transformers.Blip2Config(
        vision_config=shape | {"image_size": 12, "patch_size": 4},
        qformer_config=shape | {"encoder_hidden_size": 32, "cross_attention_frequency": 2, "vocab_size": 97},
        text_config={
            "model_type": "opt", "vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
            "ffn_dim": 48, "max_position_embeddings": 64, "word_embed_proj_dim": 32, "bos_token_id": 1,
            "eos_token_id": 2, "pad_token_id": 0,
        },
        num_query_tokens=5, image_token_index=90,
    )  # fmt: skip
    model = transformers.Blip2ForConditionalGeneration._from_config(
        config, attn_implementation="eager"
    ).eval()
    torch.nn.init.normal_(model.query_tokens)
    return model


def test_learned_queries_are_a_part_of_their_own() -> None:
    hf = blip2()
    plain = copy.deepcopy(hf)
    model = hw.load(hf)
    assert model.n_layers == 3  # the language model, whose tokens the logits belong to
    given: dict[str, Any] = {
        "input_ids": torch.tensor([[90] * 5 + [5, 6, 7, 8]]), "pixel_values": torch.randn(1, 3, 12, 12),
    }  # fmt: skip
    record = model.record(**given)
    assert record.strings[0][5:] == ["#5", "#6", "#7", "#8"]
    queries = [f"query {i}" for i in range(5)]
    assert record.part("qformer").strings == record.part("cross").strings == [queries]
    assert record.part("cross").key_axis.strings == record.part("vision").strings
    with torch.no_grad():
        seen = plain.vision_model(given["pixel_values"]).last_hidden_state
        out = plain.qformer(
            query_embeds=plain.query_tokens, encoder_hidden_states=seen, output_attentions=True
        )
    torch.testing.assert_close(record.part("qformer").map(0).dense(), out.attentions[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(
        record.part("cross").map(0).dense(), out.cross_attentions[0], atol=1e-5, rtol=0
    )


def test_the_number_of_rows_and_columns_decides() -> None:
    sample = {"input_ids": torch.zeros(2, 8), "pixel_values": torch.zeros(2, 3, 4, 4)}
    assert axes_of("text", (8, 8), sample, 5, encodes=False) == ("text", "text", {})
    assert axes_of("text", (3, 3), sample, 5, encodes=False) == ("query", "query", {"query": 3})
    assert axes_of("text", (3, 8), sample, 5, encodes=False) == ("query", "state", {"query": 3, "state": 8})
    assert axes_of("cross", (8, 5), sample, 5, encodes=False)[:2] == ("text", "image")
    assert axes_of("cross", (8, 7), sample, 5, encodes=False)[:2] == ("text", "state")
    pair = {"input_ids": torch.zeros(2, 8), "decoder_input_ids": torch.zeros(2, 6)}
    assert axes_of("cross", (6, 8), pair, None, encodes=True) == ("decoder", "encoder", {})
    assert axes_of("decoder", (6, 6), pair, None, encodes=True) == ("decoder", "decoder", {})
    assert axes_of("encoder", (8, 8), pair, None, encodes=True) == ("encoder", "encoder", {})
    sound = {"input_values": torch.zeros(2, 400)}
    assert axes_of("audio", (9, 9), sound, None, encodes=False) == ("audio", "audio", {})
    assert own_name("qformer.encoder.layer.*.attention") == "qformer"
    assert own_name("model.layers.*.attention") == "query"


def test_frames_that_stand_before_their_features_have_their_mask() -> None:
    config = transformers.Wav2Vec2BertConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        feature_projection_input_dim=10,
        position_embeddings_type="relative_key", conv_depthwise_kernel_size=3,
    )  # fmt: skip
    hf = transformers.Wav2Vec2BertForSequenceClassification(config).eval()
    given: dict[str, Any] = {
        "input_features": torch.randn(2, 12, 10),
        "attention_mask": torch.ones(2, 12).long(),
    }
    given["attention_mask"][1, 8:] = 0
    plain = copy.deepcopy(hf)
    plain.set_attn_implementation("eager")
    weights = plain(**given, output_attentions=True).attentions[0]
    record = hw.load(hf).record(**given)
    assert record.valid.sum(-1).tolist() == [12, 8]
    pattern = record.pattern(layer=0, head=1)
    torch.testing.assert_close(pattern[0], weights[0, 1], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(pattern[1, :8, :8], weights[1, 1, :8, :8], atol=1e-5, rtol=1e-4)
