"""What a transformers model reads: its inputs by name, its tables of embeddings, and how a text holds images."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

FLOATS = {"pixel_values": "image", "input_features": "audio", "input_values": "audio"}  # input → its axis
# what steers a run and is not read by it, or is said in another way
NOT_READ = {
    "self", "kwargs", "args", "labels", "past_key_values", "use_cache", "output_attentions", "output_hidden_states",
    "return_dict", "return_loss", "encoder_outputs", "attention_mask", "cache_position", "logits_to_keep",
}  # fmt: skip


def names(hf: Any) -> list[str]:
    """The inputs of a transformers model, by name."""
    return [name for name in inspect.signature(hf.forward).parameters if name not in NOT_READ]


def vision_config(hf: Any) -> Any:
    return getattr(hf.config, "vision_config", hf.config)


def embedding(hf: Any) -> Any:
    """The table of token embeddings; None where the model reads no text."""
    try:
        found = hf.get_input_embeddings()
    except NotImplementedError:
        found = None
    if hasattr(found, "num_embeddings"):
        return found
    words = getattr(hf.config.get_text_config(), "vocab_size", None)
    tables = (m for m in hf.modules() if isinstance(m, nn.Embedding) and m.num_embeddings == words)
    return next(tables, None)


def embeddings(hf: Any) -> list[Any]:
    """Every table that token ids go through: an encoder and a decoder have each their own, sharing weights or not."""
    found = [embedding(hf)]
    if hf.config.is_encoder_decoder:
        found += [getattr(stack, "embed_tokens", None) for stack in (hf.get_encoder(), hf.get_decoder())]
    return list(dict.fromkeys(table for table in found if table is not None))


def first_position(hf: Any) -> int:
    """The number of a text's first position: RoBERTa and its kin count from behind the padding's."""
    for module in hf.modules():
        table = getattr(module, "position_embeddings", None)
        skipped = getattr(module, "padding_idx", None)
        if isinstance(table, nn.Embedding) and isinstance(skipped, int) and table.padding_idx == skipped:
            return skipped + 1
    return 0


def float_input(hf: Any) -> str | None:
    """The name of the images or audio features the model reads, if it does."""
    return next((name for name in FLOATS if name in names(hf)), None)


def image_token(hf: Any) -> int | None:
    """The token that stands for images in a text, if there is one."""
    found = (getattr(hf.config, field, None) for field in ("image_token_id", "image_token_index"))
    return next((n for n in found if isinstance(n, int)), None)


def image_tokens(hf: Any, pixels: Tensor | None = None) -> int:
    """How many positions of the text one image takes; 0 where the model does not say."""
    if image_token(hf) is None:
        return 0
    if pixels is None:
        side = pair(getattr(vision_config(hf), "image_size", None))
        if side is None:
            return 0
        weight = next(hf.parameters())
        channels = getattr(vision_config(hf), "num_channels", 3)
        pixels = torch.zeros(1, channels, *side, device=weight.device, dtype=weight.dtype)
    try:
        with torch.no_grad():
            features = hf.get_image_features(pixel_values=pixels)
        features = getattr(features, "pooler_output", features)
        first = features[0] if isinstance(features, list | tuple) or features.dim() == 3 else features
        return int(first.shape[0])
    except Exception:  # models of other families want more than pixels; these are then read as text alone
        return 0


def pair(value: Any) -> tuple[int, int] | None:
    if isinstance(value, int):
        return value, value
    if isinstance(value, list | tuple) and len(value) == 2:
        return int(value[0]), int(value[1])
    return None
