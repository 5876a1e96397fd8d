"""One map of a generated text says what every step said, where the steps see keys by different rules.

The oracle is transformers' own eager attention in every step. Seen to fail with the last step's mask for the whole
text, and, without `HeldRows`, to pass with it in silence.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from tiny_models import tiny

import headwater as hw
from headwater.lens.errors import RecordError
from headwater.lens.records.steps import StepMasks

SHAPE: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 64, "head_dim": 8, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0,
}  # fmt: skip


def louder(model: Any) -> Any:
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2 and "embed" not in name:
                weight.mul_(4)
    return model.eval()


def gemma3() -> tuple[Any, dict[str, Any]]:
    """An image of four tokens that see each other in the prompt, and a text behind it."""
    torch.manual_seed(0)
    text = SHAPE | {
        "intermediate_size": 48, "sliding_window": 6, "query_pre_attn_scalar": 8,
        "layer_types": ["sliding_attention", "full_attention"],
    }  # fmt: skip
    vision = {
        "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48, "image_size": 16,
        "patch_size": 4,
    }  # fmt: skip
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=90,
        boi_token_index=91, eoi_token_index=92,
    )  # fmt: skip
    model = transformers.Gemma3ForConditionalGeneration._from_config(config, attn_implementation="eager")
    ids = torch.tensor([[1, 91, 90, 90, 90, 90, 92, 5, 6, 7, 8, 9]])
    given = {
        "input_ids": ids,
        "token_type_ids": (ids == 90).long(),
        "pixel_values": torch.randn(1, 3, 16, 16),
    }
    return louder(model), given


def moshi() -> tuple[Any, dict[str, Any]]:
    """A cache that keeps five positions under a mask that shows all of them."""
    torch.manual_seed(0)
    config = transformers.MoshiConfig(**SHAPE, ffn_dim=48, sliding_window=5)
    model = transformers.MoshiForCausalLM._from_config(config, attn_implementation="eager")
    return louder(model), {"input_ids": torch.arange(3, 15)[None]}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", [gemma3, moshi])
def test_maps_are_those_of_the_steps(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    hf, given = make()
    plain = copy.deepcopy(hf)
    with torch.no_grad():
        out = plain.generate(
            **given, max_new_tokens=6, do_sample=False, output_attentions=True, return_dict_in_generate=True,
            attention_mask=torch.ones_like(given["input_ids"]),
        )  # fmt: skip
    model = hw.load(hf)
    ids, record = generated(model, given)
    assert ids.equal(out.sequences)
    for layer in (0, 1):
        dense, row = record.map(layer).dense(), 0
        for step in out.attentions:
            weights = step[layer]
            count, keys = weights.shape[2:]
            own = dense[:, :, row : row + count, : row + count]
            assert float(own[..., : row + count - keys].abs().sum()) == 0
            torch.testing.assert_close(own[..., row + count - keys :], weights, atol=1e-5, rtol=0)
            row += count
        entropy = -torch.special.xlogy(dense, dense).sum(-1)
        told = torch.as_tensor(record.statistic("entropy").sel(layer=layer).values)
        torch.testing.assert_close(entropy, told, atol=1e-4, rtol=0)
    monkeypatch.setattr(StepMasks, "whole", lambda self, plain: plain)
    with pytest.raises(RecordError, match="attention was another than the map of the whole text says"):
        generated(model, given)


def generated(model: hw.HookedModel, given: dict[str, Any], **options: Any) -> Any:
    more = {name: value for name, value in given.items() if name != "input_ids"}
    return model.generate(given["input_ids"], 6, record=True, **more, **options)


def test_other_caches_are_refused_before_the_run() -> None:
    hf: Any = tiny("llama")
    model = hw.load(hf)
    given = {"input_ids": torch.arange(3, 9)[None]}
    with pytest.raises(RecordError, match="takes no past_key_values"):
        generated(model, given, past_key_values=transformers.DynamicCache())
    hf.generation_config.cache_implementation = "static"
    with pytest.raises(RecordError, match="cache_implementation='static' has no place for the last token"):
        generated(model, given)
