"""`samples`: short arbitrary inputs for a model, made from the arguments of its `forward` and its configuration.

Two rows each; the second row of text has padding on the right. The likeliest input comes first. Which one a model
takes, only running it says: images may be videos, features may have their bands first or last.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from headwater.lens.errors import ModelError, nearest
from headwater.lens.models.signature import FLOATS, embedding, image_token, image_tokens, names
from headwater.lens.samples.asked import Asked, Inputs
from headwater.lens.samples.floats import floats
from headwater.lens.samples.further import FURTHER, LENGTH


def samples(hf: Any) -> Iterator[Inputs]:
    """Inputs to try, by their names in transformers. Those with images or audio come before those of text alone."""
    asked = Asked(hf)
    seen: list[list[tuple[str, torch.Size]]] = []
    found: Inputs = {}
    for given in (*floats(asked), {}):
        for wanted in (asked.needed, asked.known):
            found = given | _texts(asked, given)
            for name in FURTHER.keys() & wanted - found.keys():
                with contextlib.suppress(KeyError):  # what it is made from is not there
                    found[name] = FURTHER[name](asked, found)
            shapes = [(name, tensor.shape) for name, tensor in found.items()]
            if found and shapes not in seen and asked.needed & FLOATS.keys() <= found.keys():
                seen.append(shapes)
                yield asked.placed(found)
    if set(found) >= {"input_ids", "attention_mask"}:
        yield from (asked.placed(form) for form in _forms(asked, found))


def _forms(asked: Asked, text: Inputs) -> Iterator[Inputs]:
    """The same text in forms that heads of classifiers need."""
    end = getattr(asked.hf.config.get_text_config(), "eos_token_id", None)
    if isinstance(end, int):  # the model reads a text at its end-of-text token
        ids = text["input_ids"].masked_fill(text["input_ids"] == end, max(end - 1, 0))
        last = text["attention_mask"].sum(-1, keepdim=True) - 1
        yield text | {"input_ids": ids.scatter(1, last, end)}
    yield {name: given[:1] for name, given in text.items()}  # the model has no padding token
    yield {name: given for name, given in text.items() if name != "attention_mask"}
    yield {name: given[:, None] for name, given in text.items()}  # each row is one of several choices


def as_rows(sample: Inputs) -> Inputs:
    """The sample as attention sees it: choices [row, choice, position] are rows."""
    choices = "input_ids" in sample and sample["input_ids"].dim() == 3
    return {name: given.flatten(0, 1) for name, given in sample.items()} if choices else sample


def check_sample(hf: Any, given: Mapping[str, Any]) -> Inputs:
    """A user's sample as tensors on the model's device; ModelError names what is no input or no tensor."""
    known = inspect.signature(hf.forward).parameters
    if not isinstance(given, Mapping) or not given:
        raise ModelError(
            f"sample takes inputs by their names in transformers, as in {{'input_ids': …}}; got {given!r:.60}"
        )
    if unknown := [name for name in given if name not in known]:
        raise ModelError(
            f"{type(hf).__name__} reads no {unknown[0]!r}: {nearest(str(unknown[0]), names(hf))}"
        )
    found = {}
    for name, value in given.items():
        try:
            found[name] = torch.as_tensor(value)
        except (TypeError, ValueError, RuntimeError):
            raise ModelError(f"sample: {name} must be a tensor; got {type(value).__name__}") from None
    return Asked(hf).placed(found)


def described(sample: Inputs) -> str:
    """ "input_ids [2, 24], attention_mask [2, 24]"."""
    return ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in sample.items())


def _texts(asked: Asked, given: Inputs) -> Inputs:
    table = embedding(asked.hf)
    vocab = asked.number("vocab_size", default=64) if table is None else table.num_embeddings
    wanted = asked.needed if table is None and FLOATS.keys() & asked.known else asked.known
    found = _text(asked, vocab, given, "") if "input_ids" in wanted else {}
    if "decoder_input_ids" in wanted:
        found |= _text(asked, vocab, {}, "decoder_")
    return found


def _text(asked: Asked, vocab: int, given: Inputs, prefix: str) -> Inputs:
    text = asked.hf.config.get_text_config()
    limits = (getattr(text, field, None) for field in ("max_position_embeddings", "max_target_positions"))
    length = min(LENGTH, *(n for n in limits if isinstance(n, int) and n > 0), LENGTH)
    ids = (torch.arange(2 * length).view(2, -1) * 7919 + 5) % vocab
    marker = image_token(asked.hf)
    if marker is not None:
        ids = ids.masked_fill(ids == marker, (marker + 1) % vocab)
        if "pixel_values" in given:
            count = _features(asked, given) or asked.number("num_query_tokens", default=0)
            ids = torch.cat([ids[:, :2], torch.full((2, count), marker), ids[:, 2:]], 1)
    mask = torch.ones_like(ids)
    mask[1, ids.shape[1] - length // 3 :] = 0
    return {f"{prefix}input_ids": ids, f"{prefix}attention_mask": mask}


def _features(asked: Asked, given: Inputs) -> int:
    """How many positions the images of one of the two texts take."""
    taken = (
        inspect.signature(asked.hf.get_image_features).parameters
        if hasattr(asked.hf, "get_image_features")
        else {}
    )
    inputs = asked.placed({name: value for name, value in given.items() if name in taken})
    return image_tokens(asked.hf, **inputs) // 2
