"""What a transformers model takes as input: argument names, embedding tables, image tokens in a text."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

FLOATS = {
    "pixel_values": "image",
    "pixel_values_videos": "image",
    "flattened_patches": "image",
    "visual_feats": "image",
    "input_features": "audio",
    "input_values": "audio",
    "past_values": "series",
    "states": "series",
    "inputs": "series",
}  # input → its axis
TEXTS = {"input_ids", "decoder_input_ids", "inputs"}
# arguments of `forward` that are no model input: they switch outputs or caching on, or Headwater passes them itself
NOT_READ = {
    "self", "kwargs", "args", "labels", "past_key_values", "use_cache", "output_attentions", "output_hidden_states",
    "return_dict", "return_loss", "encoder_outputs", "attention_mask", "cache_position", "logits_to_keep",
}  # fmt: skip


# of each function that is the `forward` of some model: reading a signature anew takes as long as a few products
_parameters: WeakKeyDictionary[Any, Mapping[str, inspect.Parameter]] = WeakKeyDictionary()


def parameters(hf: Any) -> Mapping[str, inspect.Parameter]:
    """The parameters of the model's `forward`, without `self`."""
    function = getattr(hf.forward, "__func__", hf.forward)
    found = _parameters.get(function)
    if found is None:
        found = _parameters[function] = inspect.signature(hf.forward).parameters
    return found


def names(hf: Any) -> list[str]:
    """The names of the model's inputs, from the signature of its `forward`."""
    return [name for name in parameters(hf) if name not in NOT_READ]


def time_axis(hf: Any, sound: Tensor) -> int:
    """The axis of a sound that is time: -1, or -2 where the features of a frame stand last, as Speech2Text reads them
    (Whisper reads [batch, feature, frame])."""
    for name in ("num_mel_bins", "input_feat_per_channel", "feature_projection_input_dim"):
        features = getattr(hf.config, name, None)
        if sound.dim() == 3 and isinstance(features, int):
            return -2 if sound.shape[-1] == features != sound.shape[-2] else -1
    return -1


def vision_config(hf: Any) -> Any:
    return getattr(hf.config, "vision_config", hf.config)


def embedding(hf: Any) -> Any:
    """The token embedding table; None if the model reads no text."""
    found = shared_embedding(hf)
    return found if found is None or hf.config.is_encoder_decoder else _running(hf, found)


def shared_embedding(hf: Any) -> Any:
    """As `embedding`, or another module with the same weight."""
    if not TEXTS & parameters(hf).keys():
        return None
    try:
        found = hf.get_input_embeddings()
    except NotImplementedError:
        found = None
    if hasattr(found, "num_embeddings"):
        return found
    words = getattr(hf.config.get_text_config(), "vocab_size", None)
    tables = (m for m in hf.modules() if isinstance(m, nn.Embedding) and m.num_embeddings == words)
    return next(tables, None)


def _running(hf: Any, table: Any) -> Any:
    """The table that runs: the encoder of T5 alone lends its table to the stack, which has a module of its own."""
    lent = [m for m in hf.modules() if isinstance(m, nn.Embedding) and m.weight is table.weight]
    return lent[-1] if lent else table


def embeddings(hf: Any) -> list[Any]:
    """All token embedding tables: encoder and decoder each have one, with shared weights or not."""
    found = [embedding(hf)]
    if hf.config.is_encoder_decoder:
        found += [getattr(stack, "embed_tokens", None) for stack in (hf.get_encoder(), hf.get_decoder())]
    return list(dict.fromkeys(table for table in found if table is not None))


def first_position(hf: Any) -> int:
    """The position id of the first token: 0, but padding_idx + 1 in RoBERTa and models like it."""
    for module in hf.modules():
        table = getattr(module, "position_embeddings", None)
        skipped = getattr(module, "padding_idx", None)
        if isinstance(table, nn.Embedding) and isinstance(skipped, int) and table.padding_idx == skipped:
            return skipped + 1
    return 0


def compares(hf: Any) -> bool:
    """Whether the model says how alike texts and images are, from two towers that run together (CLIP, SigLIP)."""
    return isinstance(getattr(hf, "logit_scale", None), Tensor)  # Cohere's is a number that multiplies logits


def float_input(hf: Any) -> str | None:
    """The name of the input for images or audio features; None if the model reads neither."""
    return next((name for name in FLOATS if name in names(hf)), None)


def image_token(hf: Any) -> int | None:
    """The id of the token that marks images in a text; None if there is none."""
    found = (getattr(hf.config, field, None) for field in ("image_token_id", "image_token_index"))
    return next((n for n in found if isinstance(n, int)), None)


def markers(hf: Any) -> dict[str, int]:
    """The ids of the tokens that stand for other inputs in a text, by kind: "image", "video", "audio"."""
    found = {kind: getattr(hf.config, f"{kind}_token_id", None) for kind in ("video", "audio")}
    found["image"] = image_token(hf)
    return {kind: token for kind, token in found.items() if isinstance(token, int)}


def image_tokens(hf: Any, pixel_values: Tensor | None = None, **more: Tensor) -> int:
    """How many positions images take in a text, measured on these or on a blank one; 0 if unknown.

    `more` are further inputs of the tower, such as the sizes of the images.
    """
    if image_token(hf) is None:
        return 0
    if pixel_values is None:
        side = pair(getattr(vision_config(hf), "image_size", None))
        if side is None:
            return 0
        weight = next(hf.parameters())
        channels = getattr(vision_config(hf), "num_channels", 3)
        pixel_values = torch.zeros(1, channels, *side, device=weight.device, dtype=weight.dtype)
    try:
        with torch.no_grad():
            features = hf.get_image_features(pixel_values=pixel_values, **more)
        return _count(getattr(features, "pooler_output", features))
    except Exception:  # some families need more inputs than pixels; these models are read as text only
        return 0


def _count(features: Any) -> int:
    """The number of vectors [image, position, d], [position, d] or of a list of these."""
    if isinstance(features, list | tuple):
        return sum(map(_count, features))
    return features[..., 0].numel()


def pair(value: Any) -> tuple[int, int] | None:
    if isinstance(value, int):
        return value, value
    if isinstance(value, list | tuple) and len(value) == 2:
        return int(value[0]), int(value[1])
    return None
