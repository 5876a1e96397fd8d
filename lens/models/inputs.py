"""All inputs of one call as one checked `Tokens`: text, and images, audio features or an encoder's text beside it.

Further inputs have transformers' names (`pixel_values`, `input_features`, `decoder_input_ids` …). The first argument of
a call is the text (the encoder's in T5 and BART, the decoder's in Whisper), or a floating-point tensor of images or
audio features.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from headwater.lens.errors import ModelError, PromptError, nearest
from headwater.lens.models.axes import axis
from headwater.lens.models.opened import Opened
from headwater.lens.models.signature import first_position, float_input, names
from headwater.lens.naming import tokens
from headwater.lens.naming.tokens import Tokens

DECODER = ("decoder_input_ids", "decoder_attention_mask")


def read(
    model: Opened, given: Any, attention_mask: Any = None, side: Literal["left", "right"] = "right",
    more: Mapping[str, Any] | None = None, following: int = 0,
) -> Tokens:  # fmt: skip
    """The inputs of one call, checked; PromptError says what is missing, unknown or out of range.

    `following` is how many tokens will be generated after the prompt; they must fit into the context too.
    """
    found = _read(model, given, attention_mask, side, more or {})
    if model.vocab:
        tokens.check(found, model.vocab, model.context, following)
    return found


def _read(model: Opened, given: Any, attention_mask: Any, side: Any, more: Mapping[str, Any]) -> Tokens:
    if isinstance(given, Tokens) and given.more:
        return given
    extra = {name: value for name, value in more.items() if value is not None}
    known = names(model.hf)
    unknown = [name for name in extra if name not in known]
    if unknown:
        raise PromptError(f"{type(model.hf).__name__} reads no {unknown[0]!r}: {nearest(unknown[0], known)}")
    floats = float_input(model.hf)
    if isinstance(given, Tensor) and given.is_floating_point() and given.dim() > 2 and floats:
        extra, given = {floats: given} | extra, None
    if given is None:
        given = extra.pop("input_ids", None)
    for name in extra.keys() - DECODER:
        extra[name] = _tensor(model, name, extra[name])
    if model.is_encoder_decoder:
        return _pair(model, given, attention_mask, side, extra)
    if model.vocab == 0:
        return _without_text(model, given, extra)
    found = _text(model, given, attention_mask, side)
    return _with_images(model, found, extra)


def _tensor(model: Opened, name: str, value: Any) -> Tensor:
    try:
        found = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        raise PromptError(f"{name} must be a tensor; got {type(value).__name__}") from None
    if found.is_floating_point() and not torch.isfinite(found).all():
        raise PromptError(f"{name} holds NaN or infinite values; give finite numbers")
    if found.numel() == 0:
        raise PromptError(f"{name} is empty; its shape is {list(found.shape)}")
    return found


def _text(model: Opened, given: Any, attention_mask: Any, side: Any) -> Tokens:
    found = tokens.to_tokens(given, model.tokenizer, attention_mask, side)
    tokens.check(found, model.vocab, None)
    outside = (found.ids < 0) | (found.ids >= model.vocab)
    return Tokens(found.ids.masked_fill(~found.mask & outside, 0), found.mask)


def _without_text(model: Opened, given: Any, extra: dict[str, Tensor]) -> Tokens:
    name = float_input(model.hf)
    if name not in extra:
        kind = "images [image, channel, height, width]" if name == "pixel_values" else "audio features"
        got = "nothing" if given is None else f"{type(given).__name__}"
        raise PromptError(f"{model.name} reads {kind} as a floating-point tensor, {name}; got {got}")
    main = next(iter(model.parts.values()))
    found = axis(main, main.queries, Tokens(torch.empty(0), torch.empty(0), extra))
    if found is None:
        raise PromptError(f"{model.name}: the number of tokens that {name} makes is not known")
    return Tokens(found.ids, found.mask, extra)


def _pair(model: Opened, given: Any, attention_mask: Any, side: Any, extra: dict[str, Any]) -> Tokens:
    """Encoder and decoder tokens; without a decoder text the decoder reads only its start token."""
    target, target_mask = (extra.pop(name, None) for name in DECODER)
    floats = float_input(model.hf)
    more: dict[str, Tensor] = dict(extra)
    if floats is None:
        source = _text(model, given, attention_mask, side)
        _fits(source.ids.shape[1], model.source_context, "the encoder's text")
        more |= {"input_ids": source.ids, "attention_mask": source.mask.long()}
        batch = len(source.ids)
    else:
        if floats not in more:
            raise PromptError(f"{model.name} reads audio or images too; give {floats}=…")
        batch = len(more[floats])
        if given is not None and target is None:
            target, target_mask = given, attention_mask
    if target is None:
        decoder = Tokens(torch.full((batch, 1), model.start), torch.ones(batch, 1, dtype=torch.bool))
    else:
        decoder = _target(model, target, target_mask)
    if len(decoder.ids) != batch:
        raise PromptError(f"the encoder reads {batch} rows and the decoder {len(decoder.ids)}; give as many")
    return Tokens(decoder.ids, decoder.mask, more)


def _target(model: Opened, given: Any, mask: Any) -> Tokens:
    """Decoder tokens. A text is what the decoder should write: it gets the start token in front, and no end token."""
    text = isinstance(given, str) or (isinstance(given, list | tuple) and given and isinstance(given[0], str))
    found = _text(model, given, mask, "right")
    if not text:
        return found
    ids, real = found.ids, found.mask
    end = getattr(model.tokenizer, "eos_token_id", None)
    ends = real & (ids == end) & (real.long().cumsum(-1) == real.long().sum(-1, keepdim=True))
    if end is not None:
        real = real & ~ends
    first = torch.full((len(ids), 1), model.start)
    if not (ids[:, 0] == model.start).all():
        ids, real = torch.cat([first, ids], 1), torch.cat([torch.ones_like(first).bool(), real], 1)
    longest = int(real.sum(-1).max())
    return Tokens(ids[:, :longest], real[:, :longest])


def _with_images(model: Opened, found: Tokens, extra: dict[str, Tensor]) -> Tokens:
    """A text with its images; one image token per image is repeated to the number of tokens that an image takes."""
    per_image, marker = model.image_tokens, model.image_token
    if "pixel_values" not in extra or marker is None or per_image == 0:
        return Tokens(found.ids, found.mask, extra)
    places = (found.ids == marker) & found.mask
    images = len(extra["pixel_values"])
    count = int(places.sum())
    if count == images and per_image > 1:
        found = _repeated(found, places, per_image)
    elif count != images * per_image:
        raise PromptError(
            f"{images} images take {images * per_image} image tokens ({marker}) in the text, or one each; got {count}"
        )
    return Tokens(found.ids, found.mask, extra)


def _repeated(found: Tokens, places: Tensor, times: int) -> Tokens:
    repeats = torch.where(places, times, 1)
    if len(set(repeats.sum(-1).tolist())) > 1:
        raise PromptError(
            "the rows hold unequal numbers of images; write out the image tokens and pad the rows"
        )
    rows = [row.repeat_interleave(n) for row, n in zip(found.ids, repeats, strict=True)]
    real = [row.repeat_interleave(n) for row, n in zip(found.mask, repeats, strict=True)]
    return Tokens(torch.stack(rows), torch.stack(real))


def _fits(length: int, context: int | None, what: str) -> None:
    if context is not None and length > context:
        raise PromptError(
            f"{what} has {length} tokens, the model's context is {context}; shorten it by {length - context}"
        )


def arguments(model: Opened, given: Tokens, generating: bool = False) -> dict[str, Any]:
    """Keyword arguments for the transformers model. With padding on the left `position_ids` count from the first real
    token."""
    known = inspect.signature(model.hf.forward).parameters
    found: dict[str, Any] = {
        n: t.to(model.device, model.dtype if t.is_floating_point() else None) for n, t in given.more.items()
    }
    if found.get("attention_mask") is not None and not generating and bool(found["attention_mask"].all()):
        del found["attention_mask"]
    if model.vocab:
        prefix = "decoder_" if model.is_encoder_decoder else ""
        found[f"{prefix}input_ids"] = given.ids.to(model.device)
        if (generating and not model.is_encoder_decoder) or not given.mask.all():
            found[f"{prefix}attention_mask"] = given.mask.long().to(model.device)
        left = not given.mask[:, 0].all() and not places_images(model.hf, given)
        if left and not generating and f"{prefix}position_ids" in known:
            positions = (given.mask.long().cumsum(-1) - 1).clamp_min(0) + first_position(model.hf)
            found[f"{prefix}position_ids"] = positions.to(model.device)
    if "use_cache" in known and not generating:
        found["use_cache"] = False
    return found


def places_images(hf: Any, given: Tokens) -> bool:
    """Whether the model numbers image tokens by row and column (Qwen-VL) and this prompt has images."""
    return hasattr(hf.base_model, "get_rope_index") and any(name.endswith("grid_thw") for name in given.more)


def last_hidden(out: Any, part: str) -> Tensor:
    """The last hidden state of a part, from any of transformers' output classes."""
    tower = getattr(out, f"{part}_model_output", None)
    if tower is not None:
        return tower.last_hidden_state
    if part == "encoder":
        return out.encoder_last_hidden_state
    if getattr(out, "last_hidden_state", None) is not None:
        return out.last_hidden_state
    for field in ("decoder_hidden_states", "hidden_states"):
        if getattr(out, field, None):
            return getattr(out, field)[-1]
    raise ModelError(f"{type(out).__name__} gives no hidden state; use model(...) for its logits")
