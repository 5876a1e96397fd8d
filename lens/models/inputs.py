"""All inputs of one call as one checked `Tokens`: text, and images, audio features or an encoder's text beside it.

Further inputs have transformers' names (`pixel_values`, `input_features`, `decoder_input_ids` …). The first argument of
a call is the text (the encoder's in T5 and BART, the decoder's in Whisper), or a floating-point tensor of images or
audio features.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from headwater.lens.errors import ModelError, PromptError, nearest
from headwater.lens.models.axes import axis
from headwater.lens.models.images import check_pictures, with_images
from headwater.lens.models.opened import Opened
from headwater.lens.models.signature import (
    FLOATS,
    embedding,
    first_position,
    float_input,
    names,
    parameters,
)
from headwater.lens.models.token_ids import labels_of
from headwater.lens.naming import tokens
from headwater.lens.naming.texts import beginning, check_choice, is_text
from headwater.lens.naming.tokens import Tokens

DECODER = ("decoder_input_ids", "decoder_attention_mask")
TYPES = "token_type_ids"
VECTORS = "inputs_embeds"  # [batch, position, d_model], in the place of the embeddings of tokens
ReadText = Callable[..., Tokens]  # (given, attention_mask=…) → tokens, with the settings of one call


def read(
    model: Opened, given: Any, attention_mask: Any = None, side: Literal["left", "right"] = "right",
    more: Mapping[str, Any] | None = None, following: int = 0, prepend_bos: bool | None = None,
) -> Tokens:  # fmt: skip
    """The inputs of one call, checked; PromptError says what is missing, unknown or out of range.

    `following` is how many tokens will be generated after the prompt; they must fit into the context too.
    `prepend_bos` is about the beginning of a text (naming/texts.py); None is the model's own.
    """
    check_choice(prepend_bos, PromptError)
    if prepend_bos is not None and not is_text(given):
        raise PromptError("prepend_bos belongs to texts; write the first token into token ids yourself")
    begins = model.prepend_bos if prepend_bos is None else prepend_bos
    main = "encoder" if model.is_encoder_decoder else "text"
    if (main, side) in model.moved_by_padding:  # texts are padded where it changes nothing
        side = "left" if side == "right" else "right"
    read_text = partial(
        tokens.to_tokens, tokenizer=model.tokenizer, side=side, prepend_bos=begins, generating=following > 0
    )
    more = dict(more or {})
    label = more.pop("label", None)
    found = _read(model, given, attention_mask, read_text, more)
    if label is not None:
        found = Tokens(found.ids, found.mask, found.more, labels_of(model, label, found), found.owners)
    if model.tokenizer is not None and not isinstance(given, Tokens) and not is_text(given):
        ids, mask = found.ids, found.mask
        if model.is_encoder_decoder and "input_ids" in found.more:
            ids, mask = found.more["input_ids"], found.more["attention_mask"]
        _warn_of_two_beginnings(model.tokenizer, ids, mask)
    if model.vocab:
        tokens.check(found, model.vocab, model.context, following)
    return found


def _warn_of_two_beginnings(tokenizer: Any, ids: Tensor, mask: Tensor) -> None:
    """Token ids are taken as they are; two beginnings are said, as for a text."""
    first = beginning(tokenizer)
    if first is None or ids.dim() != 2 or ids.shape[1] < 2 or not bool((ids == first).any()):
        return
    places = mask.long().argmax(-1, keepdim=True).to(ids.device)
    both = ids.gather(1, places), ids.gather(1, (places + 1).clamp_max(ids.shape[1] - 1))
    twice = ((both[0] == first) & (both[1] == first)).nonzero()
    if len(twice) and int(mask.sum(-1).min()) > 1:
        warnings.warn(
            f"row {int(twice[0, 0])} of the token ids begins twice with {tokenizer.decode([first])!r}; both are kept; "
            "leave one out if it is not meant",
            stacklevel=2,
        )


def _read(model: Opened, given: Any, attention_mask: Any, read: ReadText, more: Mapping[str, Any]) -> Tokens:
    extra = {name: value for name, value in more.items() if value is not None}
    if isinstance(given, Tokens) and (given.more or (not extra and given.labels is not None)):
        if extra:
            raise PromptError(
                f"these tokens hold {', '.join(given.more)} already; give {next(iter(extra))} where they are made"
            )
        return given
    known = names(model.hf)
    unknown = [name for name in extra if name not in known]
    if unknown:
        raise PromptError(f"{type(model.hf).__name__} reads no {unknown[0]!r}: {nearest(unknown[0], known)}")
    floats = float_input(model.hf)
    waves = floats == "input_values" and not model.vocab  # samples [sound, sample]
    if (
        isinstance(given, Tensor)
        and given.is_floating_point()
        and given.dim() > (1 if waves else 2)
        and floats
    ):
        extra, given = {floats: given} | extra, None
    if given is None:
        given = extra.pop("input_ids", None)
    elif "input_ids" in extra:
        raise PromptError(
            "the text is given twice, as the prompt and as input_ids; give it once"
            + (", and the decoder's text as decoder_input_ids" if model.is_encoder_decoder else "")
        )
    for name in extra.keys() - DECODER:
        extra[name] = _tensor(model, name, extra[name])
    if VECTORS in extra and (model.is_encoder_decoder or "vision" in model.parts):
        raise PromptError(
            f"{VECTORS} take the place of one text; {model.name} reads more than that: give token ids"
        )
    if model.is_encoder_decoder:
        return _pair(model, given, attention_mask, read, extra)
    if VECTORS in extra:
        return _of_vectors(model, given, attention_mask, extra)
    if model.vocab == 0:
        return _without_text(model, given, _masked(model, extra, attention_mask))
    found = with_images(model, _text(model, read(given, attention_mask=attention_mask)), extra)
    _check_types(model, found)
    return found


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


def _text(model: Opened, found: Tokens) -> Tokens:
    """`found` without the further inputs that the model does not take, checked; padding gets an id that is embedded."""
    tokens.check(found, model.vocab, None)
    ids = found.ids
    if not bool(found.mask.all()):
        outside = (ids < 0) | (ids >= model.vocab)
        ids = ids.masked_fill(~found.mask & outside, 0)
    known = ["attention_mask", *names(model.hf)] if found.more else []
    more = {name: value for name, value in found.more.items() if name in known}
    return found.changed(ids, found.mask, more)


def _check_types(model: Opened, found: Tokens) -> None:
    types = found.more.get(TYPES)
    if types is None:
        return
    if types.shape != found.ids.shape or types.is_floating_point():
        raise PromptError(
            f"{TYPES} must be integers of the tokens' shape {list(found.ids.shape)}; "
            f"got {types.dtype} {list(types.shape)}"
        )
    kinds = getattr(model.hf.config, "type_vocab_size", None)
    if isinstance(kinds, int) and kinds and (int(types.min()) < 0 or int(types.max()) >= kinds):
        raise PromptError(
            f"{TYPES} go from {int(types.min())} to {int(types.max())}; {model.name} knows 0 to {kinds - 1}"
        )


def _of_vectors(model: Opened, given: Any, attention_mask: Any, extra: dict[str, Tensor]) -> Tokens:
    """Positions that are given as vectors: they have no ids, and are numbered from 0."""
    vectors = extra[VECTORS]
    width = getattr(embedding(model.hf), "embedding_dim", model.d_model)
    if given is not None:
        raise PromptError(f"{VECTORS} stand in the place of tokens; give one of them")
    if vectors.dim() != 3 or vectors.shape[-1] != width or not vectors.is_floating_point():
        raise PromptError(
            f"{VECTORS} are floating-point [batch, position, {width}]; got {vectors.dtype} {list(vectors.shape)}"
        )
    places = torch.arange(vectors.shape[1]).expand(len(vectors), -1).contiguous()
    found = tokens.to_tokens(places, None, attention_mask)
    return found.changed(found.ids.clamp_max(model.vocab - 1), found.mask, {**found.more, **extra})


def _without_text(model: Opened, given: Any, extra: dict[str, Tensor]) -> Tokens:
    name = float_input(model.hf)
    if name not in extra:
        kind = "sounds" if FLOATS.get(name or "") == "audio" else "pictures"
        got = "nothing" if given is None else f"{type(given).__name__}"
        raise PromptError(
            f"{model.name} reads {kind}: give a path, an array or hw.Example(…) where it has a processor, or a "
            f"floating-point tensor as {name}=; got {got}"
        )
    check_pictures(model, extra.get("pixel_values"))
    main = next(iter(model.parts.values()))
    found = axis(main, main.queries, Tokens(torch.empty(0), torch.empty(0), extra))
    if found is None:
        raise PromptError(f"{model.name}: the number of tokens that {name} makes is not known")
    return Tokens(found.ids, found.mask, extra)


def _masked(model: Opened, extra: dict[str, Tensor], attention_mask: Any) -> dict[str, Tensor]:
    """The inputs with the mask of what is heard or seen [example, sample]; PromptError where the model reads none."""
    if attention_mask is None:
        return extra
    if "attention_mask" not in parameters(model.hf):
        raise PromptError(f"{model.name} reads no attention_mask; leave it out")
    mask = _tensor(model, "attention_mask", attention_mask)
    if not ((mask == 0) | (mask == 1)).all():
        raise PromptError("attention_mask holds 1 for what is real and 0 for padding, and nothing between")
    return {**extra, "attention_mask": mask.long()}


def _pair(
    model: Opened, given: Any, attention_mask: Any, read: ReadText, extra: dict[str, Any]
) -> Tokens:  # fmt: skip
    """Encoder and decoder tokens; without a decoder text the decoder reads only its start token."""
    target, target_mask = (extra.pop(name, None) for name in DECODER)
    more: dict[str, Tensor] = dict(extra)
    floats = next((name for name in FLOATS if name in more), float_input(model.hf))
    source = None
    if floats is None or "input_ids" in names(model.hf):
        source = _text(model, read(given, attention_mask=attention_mask))
        if "attention_mask" in source.more:
            raise PromptError(f"{model.name} reads two texts; a mask of pairs is for models of one")
        _fits(source.ids.shape[1], model.source_context, "the encoder's text")
        more |= {"input_ids": source.ids, "attention_mask": source.mask.long(), **source.more}
        batch = len(source.ids)
    else:
        if floats not in more:
            raise PromptError(f"{model.name} reads audio or images too; give {floats}=…")
        batch = len(more[floats])
        if given is not None and target is None:
            target, target_mask = given, attention_mask
        else:  # it is of what the encoder reads
            more = _masked(model, more, attention_mask)
    if target is None and source is not None and model.classes:  # a classifier's decoder reads the text too
        first = torch.full((batch, 1), model.start)
        decoder = Tokens(torch.cat([first.to(source.ids), source.ids[:, :-1]], 1), source.mask)
    elif target is None:
        decoder = Tokens(torch.full((batch, 1), model.start), torch.ones(batch, 1, dtype=torch.bool))
    else:
        decoder = _target(model, target, target_mask)
    if len(decoder.ids) != batch:
        raise PromptError(f"the encoder reads {batch} rows and the decoder {len(decoder.ids)}; give as many")
    return Tokens(decoder.ids, decoder.mask, more)


def _target(model: Opened, given: Any, mask: Any) -> Tokens:
    """Decoder tokens. A text is what the decoder should write: it gets the start token in front, and no end token."""
    found = _text(model, tokens.to_tokens(given, model.tokenizer, mask))
    if not is_text(given):
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


def _fits(length: int, context: int | None, what: str) -> None:
    if context is not None and length > context:
        raise PromptError(
            f"{what} has {length} tokens, the model's context is {context}; shorten it by {length - context}"
        )


def arguments(model: Opened, given: Tokens, generating: bool = False) -> dict[str, Any]:
    """Keyword arguments for the transformers model. With padding on the left `position_ids` count from the first real
    token."""
    known = parameters(model.hf)
    found: dict[str, Any] = {
        n: t.to(model.device, model.dtype if t.is_floating_point() else None) for n, t in given.more.items()
    }
    mask = found.get("attention_mask")
    if mask is not None and mask.dim() == 2 and not generating and bool(mask.all()):
        del found["attention_mask"]
    if model.vocab:
        prefix = "decoder_" if model.is_encoder_decoder else ""
        if VECTORS not in found:
            found[f"{prefix}input_ids"] = _filled(model, given).to(model.device)
        if (generating and not model.is_encoder_decoder) or not given.mask.all():
            found[f"{prefix}attention_mask"] = given.mask.long().to(model.device)
        left = not given.mask[:, 0].all() and not places_images(model.hf, given)
        if left and not generating and f"{prefix}position_ids" in known:
            positions = (given.mask.long().cumsum(-1) - 1).clamp_min(0) + first_position(model.hf)
            found[f"{prefix}position_ids"] = positions.to(model.device)
    if model.by_choice:
        found = {name: given[:, None] for name, given in found.items()}
    if "use_cache" in known and not generating:
        found["use_cache"] = False
    return found


def _filled(model: Opened, given: Tokens) -> Tensor:
    """The ids, with the model's own padding token on padding: a classifier may find the end of a text by it."""
    filler = getattr(model.hf.config.get_text_config(), "pad_token_id", None)
    if given.mask.all() or not isinstance(filler, int) or not 0 <= filler < model.vocab:
        return given.ids
    return given.ids.masked_fill(~given.mask, filler)


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
