"""Tokenizers of one token per word, for models of a vocabulary of 97: `<pad>`, `<bos>`, `<eos>`, `w3` … `w96`."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<pad>", "<bos>", "<eos>"]
WORDS = [*SPECIAL, *(f"w{i}" for i in range(3, 97))]
CHAT = (
    "{{ bos_token }} {% for one in messages %}{{ 'w3' if one['role'] == 'user' else 'w4' }} {{ one['content'] }} "
    "{% endfor %}{% if add_generation_prompt %}w4{% endif %}"
)


def words(single: str | None = None, pair: str | None = None, start: str = "<bos>", **more: Any) -> Any:
    """A tokenizer that puts what the templates say, as in "<bos> $A" and "<bos> $A <eos> $B:1"; None puts nothing.

    With `start="[CLS]"` token 1 is a class token, and there is no other that begins a text.
    """
    names = [start if word == "<bos>" else word for word in WORDS]
    bare = Tokenizer(models.WordLevel({word: i for i, word in enumerate(names)}, unk_token="<eos>"))
    bare.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    if single is not None:
        ids = [(word, i) for i, word in enumerate(names[:3])]
        bare.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=ids)  # type: ignore[assignment]
    kind = {"cls_token" if start == "[CLS]" else "bos_token": start}
    return PreTrainedTokenizerFast(
        tokenizer_object=bare, **kind, eos_token="<eos>", pad_token="<pad>", **more
    )
