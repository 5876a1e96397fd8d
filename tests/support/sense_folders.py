"""Folders of tiny models that read pictures, sound and two texts, with tokenizers and settings of processors."""

from __future__ import annotations

import json
import wave
from pathlib import Path

import numpy as np
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from headwater.lens.loading import zoo
from headwater.lens.loading.zoo_shapes import FRAMES, IMAGE, IMAGE_TOKEN, MELS, PATCH

RATE = 16_000
WORDS = ("<unk>", "<s>", "</s>", "the", "cat", "sat", "on", "a", "mat", "what", "is", "it")
PICTURES = {
    "do_resize": True, "size": {"height": IMAGE, "width": IMAGE}, "do_rescale": True, "rescale_factor": 1 / 255,
    "do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.25] * 3, "do_center_crop": False,
    "do_convert_rgb": True,
}  # fmt: skip
SOUNDS = {
    "feature_extractor_type": "WhisperFeatureExtractor", "feature_size": MELS, "sampling_rate": RATE,
    "hop_length": RATE // FRAMES, "chunk_length": 1, "n_fft": 400, "padding_value": 0.0,
}  # fmt: skip


def save(name: str, folder: Path) -> Path:
    """The zoo's model of a family, one of vit_classifier, clip, llava, whisper and t5, as a folder."""
    zoo.build(name).save_pretrained(folder)
    if name != "vit_classifier":
        table = {word: i for i, word in enumerate(WORDS)}
        table |= {f"w{i}": i for i in range(len(WORDS), zoo.FAMILIES["t5"].config["vocab_size"])}
        del table[f"w{IMAGE_TOKEN}"]
        table["<image>"] = IMAGE_TOKEN
        words = Tokenizer(models.WordLevel(table, unk_token="<unk>"))
        words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        PreTrainedTokenizerFast(
            tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>",
            additional_special_tokens=["<image>"], extra_special_tokens={"image_token": "<image>"},
        ).save_pretrained(folder)  # fmt: skip
    kinds = {
        "vit_classifier": "ViTImageProcessor",
        "clip": "CLIPImageProcessor",
        "llava": "CLIPImageProcessor",
    }
    settings = PICTURES | {"image_processor_type": kinds[name]} if name in kinds else SOUNDS
    if name == "llava":
        more = {"processor_class": "LlavaProcessor", "patch_size": PATCH, "num_additional_image_tokens": 0}
        more |= {"vision_feature_select_strategy": "full", "image_token": "<image>"}
        (folder / "processor_config.json").write_text(json.dumps(more))
        settings |= {"processor_class": "LlavaProcessor"}
    if name != "t5":
        (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder


def photograph(seed: int = 0, size: tuple[int, int] = (30, 20)) -> Image.Image:
    """A picture of random coarse squares, so that JPEG keeps it nearly."""
    squares = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), np.uint8)
    return Image.fromarray(squares).resize(size, Image.Resampling.NEAREST)


def tone(path: Path, seconds: float = 0.5, rate: int = RATE) -> Path:
    """A WAV of 16 bits with one tone."""
    samples = (20_000 * np.sin(np.arange(int(seconds * rate)) * 2 * np.pi * 440 / rate)).astype("<i2")
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(samples.tobytes())
    return path
