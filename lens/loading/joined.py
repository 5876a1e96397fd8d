"""`join`: a vision–language model made of a language model and a tower that were added, and a projector between them.

Nothing is copied on disk: both are read from their own folders, and the projector from the embedded one.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import LlavaConfig, LlavaForConditionalGeneration, PreTrainedModel, PreTrainedTokenizerFast

from headwater.lens.errors import ModelError
from headwater.lens.files import parse_json, read_text
from headwater.lens.trained.joined import PROJECTOR

UNUSED, IMAGE = "<reponame>", "<image>"  # the image token takes the place of one that texts do not use
CONFIG_BYTES = 2**16
# A question as the language model was taught to read one, behind the picture; its standing system message is left out.
CHAT = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{{ '<image>\n' if part['type'] == 'image' else part['text'] }}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def join(folder: Path, language: PreTrainedModel, tower: PreTrainedModel) -> LlavaForConditionalGeneration:
    """Both models and the folder's projector as one model, in eval mode; their weights are used as they are.

    The tower reads pictures of the size that gives `image_seq_length` patches, not of the size that it was trained on.
    """
    told = parse_json(read_text(folder / "config.json", CONFIG_BYTES, ModelError), str(folder), ModelError)
    tower.config.image_size = math.isqrt(told["image_seq_length"]) * tower.config.patch_size
    given = {**told, "text_config": language.config.to_dict(), "vision_config": tower.config.to_dict()}
    config = LlavaConfig(**given)
    config.text_config, config.vision_config = language.config, tower.config
    config._attn_implementation = "eager"
    with torch.device("meta"):
        whole: Any = LlavaForConditionalGeneration(config)
    dtype = next(language.parameters()).dtype
    projector = whole.model.multi_modal_projector
    weights = {name: value.to(dtype) for name, value in load_file(folder / PROJECTOR).items()}
    projector.load_state_dict(weights, assign=True)
    whole.model.language_model, whole.lm_head = language.model, language.lm_head
    whole.model.vision_tower = tower
    whole.generation_config = language.generation_config
    return whole.requires_grad_(True).eval()


def with_image_token(tokenizer: Any) -> PreTrainedTokenizerFast:
    """The language model's tokenizer, in which one unused token is called <image>."""
    written = tokenizer.backend_tokenizer.to_str()
    if f'"{UNUSED}"' not in written:
        raise ModelError(f"the tokenizer of the language model has no token {UNUSED} to stand for pictures")
    named = {name: getattr(tokenizer, name) for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(written.replace(f'"{UNUSED}"', f'"{IMAGE}"')),
        chat_template=CHAT, extra_special_tokens=[IMAGE], **named,
    )  # fmt: skip
