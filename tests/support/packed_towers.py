"""Tiny models whose tower packs the patches of all pictures into one row, and inputs for them."""

from __future__ import annotations

from typing import Any

import torch
import transformers

IMAGE = 90
TEXT = {
    "vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
}  # fmt: skip
TOWERS: dict[str, dict[str, Any]] = {
    "Qwen2VLForConditionalGeneration": {"embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2},
    "Qwen2_5_VLForConditionalGeneration": {
        "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 32, "window_size": 16,
        "fullatt_block_indexes": [1],
    },
}  # fmt: skip


def made(name: str) -> Any:
    kind = getattr(transformers, name)
    tower = TOWERS[name] | {"depth": 2, "num_heads": 4, "patch_size": 4}
    config = kind.config_class(
        text_config=TEXT, vision_config=tower, image_token_id=IMAGE, vision_start_token_id=91,
        vision_end_token_id=92, video_token_id=93,
    )  # fmt: skip
    torch.manual_seed(0)
    return kind._from_config(config, attn_implementation="eager").eval()


def inputs() -> dict[str, Any]:
    """Two texts, with images of 4 × 8 and 4 × 4 patches, of which 2 × 2 are one token."""
    seeded = torch.Generator().manual_seed(1)
    words = torch.randint(5, 80, (2, 12), generator=seeded)
    words[0, 2:10] = words[1, 2:6] = IMAGE
    return {
        "input_ids": words, "mm_token_type_ids": (words == IMAGE).long(),
        "pixel_values": torch.randn(48, 3 * 2 * 4 * 4, generator=seeded),
        "image_grid_thw": torch.tensor([[1, 4, 8], [1, 4, 4]]),
    }  # fmt: skip
