"""What the configurations of the zoo share: sizes, and what a family is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

VOCAB, LAYERS, HEADS, WIDTH = 97, 2, 4, 32
IMAGE, PATCH, IMAGE_TOKEN = 12, 4, 90  # pixels per side of an image and of a patch; the token id of a patch
MELS, FRAMES, SAMPLES = (
    8,
    20,
    60,
)  # of speech; Whisper halves the frames, the waves' convolutions quarter the samples
IDS: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
    "intermediate_size": 48, "max_position_embeddings": 64, **IDS,
}  # fmt: skip
GROUPED = SHAPE | {"num_key_value_heads": 2}
NARROW = GROUPED | {"head_dim": 8}
VISION: dict[str, Any] = {
    "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "intermediate_size": 48,
    "image_size": IMAGE, "patch_size": PATCH,
}  # fmt: skip
ENCODER_DECODER: dict[str, Any] = {
    "vocab_size": VOCAB, "d_model": WIDTH, "encoder_layers": LAYERS, "decoder_layers": LAYERS,
    "encoder_attention_heads": HEADS, "decoder_attention_heads": HEADS, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
    "decoder_start_token_id": 2, **IDS,
}  # fmt: skip
HALF = ["sliding_attention", "full_attention"]
Kind = Literal[
    "decoder", "encoder", "classifier", "seq2seq", "speech", "audio", "image", "pair", "chat", "form"
]


@dataclass(frozen=True)
class Family:
    """One architecture: the transformers class, the fields of its configuration, and its kind of input.

    `kind` is "decoder", "encoder" (text), "classifier" (text, one answer for each text), "seq2seq", "speech"
    (spectrograms, and the decoder's text), "audio" (waves), "image", "pair" (image and text towers), "chat" (images
    inside a text) or "form" (inputs in a form of their own, zoo_forms.py). `static`: whether the family supports
    generation with a static cache. `louder`: the factor on weight matrices. `change`: what is done to the linear layers
    of the model once it is made: "lora" adapters that are not merged (peft), "8bit" or "4bit" weights (bitsandbytes).
    """

    title: str
    model: str
    kind: Kind
    config: dict[str, Any]
    static: bool = True
    louder: float = 4.0
    change: Literal["", "lora", "8bit", "4bit"] = ""


def without(shape: dict[str, Any], *names: str) -> dict[str, Any]:
    """The fields of a configuration but for `names`."""
    return {name: value for name, value in shape.items() if name not in names}
