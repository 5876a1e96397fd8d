"""On which sides a model can be padded: a text behind or before padding is held to the text alone, once, on load.

A model that counts positions from the first column is moved by padding on the left, one that reads the last column by
padding on the right. What moves is measured, whatever the architecture is called.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from headwater.lens.errors import PromptError
from headwater.lens.models import inputs
from headwater.lens.models.classes import logits_of
from headwater.lens.models.opened import Opened
from headwater.lens.models.signature import float_input, markers
from headwater.lens.naming.tokens import Tokens, is_of_tokens

LENGTH, PADDING = 6, 4  # tokens of the text, and columns of padding
SIDES = ("left", "right")


def moved_sides(model: Opened) -> frozenset[tuple[str, str]]:
    """(text, side) for each side on which padding changes what the model gives; the text is "text", or "encoder" and
    "decoder"."""
    if not model.vocab or (model.context or LENGTH + PADDING) < LENGTH + PADDING:
        return frozenset()
    if model.is_encoder_decoder and float_input(model.hf) is not None:
        return frozenset()
    texts = ("encoder", "decoder") if model.is_encoder_decoder else ("text",)
    texts = texts[:1] if model.classes else texts  # a classifier's decoder reads the same text
    text = _text(model)
    try:
        alone = _output(model, _given(model, text, "", ""))
        return frozenset(
            (which, side) for which in texts for side in SIDES if not _same(model, alone, text, which, side)
        )
    except Exception:  # of any kind: the model reads no text without more inputs
        return frozenset()


def refuse_moved(model: Opened, given: Tokens) -> None:
    """PromptError for padding on a side on which it changes what the model gives."""
    for which, mask in masks(model, given).items():
        for side, column in zip(SIDES, (0, -1), strict=True):
            if (which, side) in model.moved_by_padding and not mask[:, column].all():
                raise PromptError(
                    f"padding on the {side} changes what {model.name} gives for a text; give the rows one by one"
                    + (
                        ""
                        if (which, other(side)) in model.moved_by_padding
                        else f", or pad on the {other(side)}"
                    )
                )


def other(side: str) -> str:
    return SIDES[1 - SIDES.index(side)]


def masks(model: Opened, given: Tokens) -> dict[str, Tensor]:
    """Which tokens are real, bool [batch, position], of each text that the model reads."""
    if not model.vocab:
        return {}
    found = {"decoder" if model.is_encoder_decoder else "text": given.mask}
    if model.is_encoder_decoder and "attention_mask" in given.more and "input_ids" in given.more:
        found["encoder"] = given.more["attention_mask"].bool()
    return found


def without(model: Opened, one: Tokens) -> Tokens:
    """One row without its padding, [1, position], of every text that the model reads."""
    more = dict(one.more)
    real = masks(model, one)
    if "encoder" in real:
        kept = real["encoder"][0].to(more["input_ids"].device)
        more |= {name: more[name][:, kept] for name in ("input_ids", "attention_mask")}
    own = one.mask[0]
    more = {
        name: given[:, own.to(given.device)]
        if name not in ("input_ids", "attention_mask") and is_of_tokens(name, given, one.shape)
        else given for name, given in more.items()
    }  # fmt: skip
    return one.changed(one.ids[:, own], one.mask[:, own], more)


def _text(model: Opened) -> Tensor:
    """A few ordinary tokens and the one that ends a text, int64 [1, position]."""
    config = model.hf.config.get_text_config()
    named = [
        getattr(config, f"{name}_token_id", None) for name in ("pad", "bos", "eos", "cls", "sep", "mask")
    ]
    ends = [
        token for each in named for token in (each if isinstance(each, list | tuple) else [each])
    ]  # GLM-4 has three
    taken = {*ends, *markers(model.hf).values()}
    known = [token for token in range(min(model.vocab, 64)) if token not in taken] or [0]
    ids = [known[(3 * n + 1) % len(known)] for n in range(LENGTH)]
    end = getattr(config, "eos_token_id", None)
    end = end[0] if isinstance(end, list | tuple) and end else end
    return torch.tensor([[*ids[:-1], end if isinstance(end, int) and 0 <= end < model.vocab else ids[-1]]])


def _given(model: Opened, text: Tensor, which: str, side: str) -> Tokens:
    """The same text for all that the model reads, the one that is named with padding."""
    found = _padded(text, side if which != "encoder" or model.classes else "")
    if not model.is_encoder_decoder:
        return found
    encoder = _padded(text, side if which == "encoder" else "")
    return Tokens(found.ids, found.mask, {"input_ids": encoder.ids, "attention_mask": encoder.mask.long()})


def _padded(ids: Tensor, side: str) -> Tokens:
    blank, real = ids.new_zeros(1, PADDING if side else 0), torch.ones_like(ids, dtype=torch.bool)
    order = slice(None, None, -1 if side == "left" else 1)
    return Tokens(torch.cat([ids, blank][order], 1), torch.cat([real, blank.bool()][order], 1))


@torch.no_grad()
def _output(model: Opened, given: Tokens) -> Tensor:
    out: Any = model.hf(**inputs.arguments(model, given))
    found = logits_of(out)
    found = out.last_hidden_state if found is None else found
    return found[given.mask.to(found.device)] if found.shape[:2] == given.mask.shape else found


def _same(model: Opened, alone: Tensor, text: Tensor, which: str, side: str) -> bool:
    padded = _output(model, _given(model, text, which, side))
    near = {torch.float64: 1e-7, torch.float32: 1e-4}.get(model.dtype, 5e-2)
    return padded.shape == alone.shape and bool((padded - alone).abs().max() <= near * alone.abs().max())
