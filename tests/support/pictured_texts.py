"""A tiny model that writes to a picture and a text, with a processor of transformers that writes the tokens of both."""

from __future__ import annotations

from typing import Any

import torch
import transformers as T
from tokenizers import Tokenizer, models, pre_tokenizers

WORDS = ("<unk>", "<s>", "</s>", "the", "cat", "sat", "on", "a", "mat", "what", "is", "it", "\n")
IMAGE, VOCAB, SIDE = 60, 64, 16
TOWER = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
         "image_size": SIDE, "patch_size": 4, "model_type": "siglip_vision_model"}  # fmt: skip
TEXT = {"vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 64,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "model_type": "gemma"}  # fmt: skip


def paligemma() -> tuple[Any, Any]:
    """PaliGemma and its processor."""
    torch.manual_seed(0)
    config = T.PaliGemmaConfig(
        text_config=TEXT, vision_config=TOWER, image_token_index=IMAGE, projection_dim=16, hidden_size=16
    )
    config.image_token_id = IMAGE
    table = {word: i for i, word in enumerate(WORDS)}
    table |= {f"w{i}": i for i in range(len(WORDS), VOCAB) if i != IMAGE} | {"<image>": IMAGE}
    words = Tokenizer(models.WordLevel(table, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = T.PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>",
        additional_special_tokens=["<image>"], extra_special_tokens={"image_token": "<image>"},
    )  # fmt: skip
    pictures: Any = T.SiglipImageProcessorPil(size={"height": SIDE, "width": SIDE})
    pictures.image_seq_length = (SIDE // 4) ** 2
    return T.PaliGemmaForConditionalGeneration(config).eval(), T.PaliGemmaProcessor(pictures, tokenizer)
