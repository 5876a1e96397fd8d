"""`as_inputs`: examples as users have them → a prompt and further inputs under transformers' names.

Pictures and sounds go through the model's own processor. In a text with pictures the processor also writes the tokens
that stand for them; without such a processor one image token in the text stands for each picture.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from os import PathLike
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from headwater.lens.errors import PromptError
from headwater.lens.examples.example import Example
from headwater.lens.examples.processor import features_of, pixels_of
from headwater.lens.media.pictures import pictures as read
from headwater.lens.media.sounds import is_waveform
from headwater.lens.models.opened import Opened
from headwater.lens.models.signature import FLOATS, float_input, names, parameters
from headwater.lens.naming.texts import beginning, is_single, short
from headwater.lens.naming.tokens import pad_id


class Inputs(NamedTuple):
    """A prompt, its mask, further inputs under transformers' names (and `label`), and what is still to be done about
    the beginning of texts."""

    given: Any
    mask: Any
    more: dict[str, Any]
    prepend_bos: bool | None = None


def as_inputs(
    model: Opened, given: Any, mask: Any, more: Mapping[str, Any], side: str, prepend_bos: bool | None = None,
    generating: bool = False,
) -> Inputs:  # fmt: skip
    """The inputs of one call; what is no example, picture or sound is left as it is. PromptError says what is wrong."""
    examples = _examples(model, given)
    if examples is None:
        return Inputs(given, mask, dict(more), prepend_bos)
    if mask is not None:
        raise PromptError("attention_mask belongs to token ids; an example's is more={'attention_mask': …}")
    for each in examples:
        _check_fields(model, each)
    side = side if (_main(model), side) not in model.moved_by_padding else _other(side)
    found = _media(model, examples)
    if found.keys() & more.keys():
        raise PromptError(f"the examples hold {sorted(found.keys() & more.keys())[0]} already; give it once")
    prompt, own = _prompts(model, examples, side, prepend_bos, generating)
    found |= {name: _joined(name, [each.more.get(name) for each in examples]) for name in _names(examples)}
    mask = found.pop("attention_mask", None) if own.mask is None else own.mask
    found |= own.more | _decoders(model, examples)
    labels = _all_or_none(examples, "label")
    if labels is not None:
        found["label"] = labels
    return Inputs(prompt, mask, found | dict(more), None if isinstance(prompt, Tensor) else prepend_bos)


def _examples(model: Opened, given: Any) -> list[Example] | None:
    """The examples, if these are some: examples, pictures and sounds, or a list of them."""
    if isinstance(given, Example):
        return [given]
    if (lone := _medium(model, given)) is not None:
        return [lone]
    if not isinstance(given, list | tuple) or not given:
        return None
    if any(isinstance(each, Example) for each in given):
        odd = next((each for each in given if not isinstance(each, Example)), None)
        if odd is not None:
            raise PromptError(f"the list holds examples and {short(odd)}; give examples alone")
        return list(given)
    media = [_medium(model, each) for each in given]
    if all(each is None for each in media):
        return None
    if None in media:
        raise PromptError(
            f"the list holds pictures or sounds and {short(given[media.index(None)])}; give one kind"
        )
    return [each for each in media if each is not None]


def _medium(model: Opened, given: Any) -> Example | None:
    """An example of one picture or one sound; None for what is neither."""
    kind = FLOATS.get(float_input(model.hf) or "")
    if isinstance(given, Image.Image):
        if kind != "image":
            raise PromptError(f"{model.name} reads no pictures; got an image of PIL")
        return Example(image=given)
    if isinstance(given, PathLike | bytes) or (isinstance(given, str) and not model.vocab):
        if kind is None:
            what = "bytes" if isinstance(given, bytes) else f"the path {str(given)!r}"
            raise PromptError(f"{model.name} reads text alone; got {what}; give its text")
        return Example(image=given) if kind == "image" else Example(audio=given)
    if kind == "audio" and is_waveform(given):
        return Example(audio=given)
    if kind == "image" and isinstance(given, np.ndarray | Tensor):
        bytes_ = given.dtype in (np.uint8, torch.uint8)
        plain = (
            isinstance(given, np.ndarray)
            and given.dtype.kind == "f"
            and given.ndim == 3
            and given.shape[-1] == 3
        )
        if (bytes_ and (given.ndim == 3 or (given.ndim == 2 and not model.vocab))) or plain:
            return Example(image=given)
    return None


def _check_fields(model: Opened, given: Example) -> None:
    kinds = {FLOATS[name] for name in names(model.hf) if name in FLOATS}
    if given.images and "image" not in kinds:
        raise PromptError(f"{model.name} reads no pictures; leave image= out")
    if given.audio is not None and "audio" not in kinds:
        raise PromptError(f"{model.name} reads no sounds; leave audio= out")
    if given.decoder is not None and not model.is_encoder_decoder:
        raise PromptError(f"{model.name} is no encoder–decoder; leave decoder= out")
    written = given.text is not None or given.ids is not None
    if written and not model.vocab:
        raise PromptError(f"{model.name} reads no text; leave text= and ids= out")
    if written and given.decoder is not None and "input_ids" not in names(model.hf):
        raise PromptError(f"{model.name} reads one text, the decoder's; give it as text= or as decoder=")


def _main(model: Opened) -> str:
    return "encoder" if model.is_encoder_decoder else "text"


def _other(side: str) -> str:
    return "left" if side == "right" else "right"


def _all_or_none(examples: Sequence[Example], field: str) -> list[Any] | None:
    """A field of every example; None where no example has it."""
    values = [getattr(each, field) for each in examples]
    has = [value is not None for value in values]
    if not any(has):
        return None
    if not all(has):
        raise PromptError(
            f"example {has.index(True)} has {field} and example {has.index(False)} has none; give it in all examples "
            "or in none"
        )
    return values


def _names(examples: Sequence[Example]) -> list[str]:
    wanted = list(dict.fromkeys(name for each in examples for name in each.more))
    for place, each in enumerate(examples):
        if missing := [name for name in wanted if name not in each.more]:
            raise PromptError(
                f"example {place} lacks {missing[0]}, which others have; give it in all or in none"
            )
    return wanted


def _joined(name: str, given: Sequence[Any]) -> Tensor:
    """One input of all examples, each as for a batch of one."""
    try:
        return torch.cat([torch.as_tensor(each) for each in given])
    except (TypeError, ValueError, RuntimeError) as error:
        told = " ".join(str(error).split())
        raise PromptError(f"{name} of the examples does not join: {told:.120}; give equal shapes") from None


def _media(model: Opened, examples: Sequence[Example]) -> dict[str, Any]:
    """Pictures and sounds as the model's inputs. Those of texts that a processor writes come with the texts."""
    found: dict[str, Any] = {}
    pictures = [each.images for each in examples]
    if any(pictures) and any(
        part.patches is not None and part.patches.depth for part in model.parts.values()
    ):
        found |= _known(model, _films(model, pictures))
    elif any(pictures) and not _writes(model, examples):
        if model.image_token is None and any(len(each) != 1 for each in pictures):
            place = next(n for n, each in enumerate(pictures) if len(each) != 1)
            raise PromptError(
                f"example {place} has {len(pictures[place])} pictures; {model.name} reads one in each example"
            )
        flat = read((f"picture {n}", each) for n, each in enumerate(chain.from_iterable(pictures)))
        found |= _known(model, pixels_of(model.processor, flat, model.name))
    sounds = _all_or_none(examples, "audio")
    if sounds is not None:
        heard = features_of(model.processor, sounds, model.name)
        heard_mask = heard.get("attention_mask")
        found |= _known(model, heard)
        takes = "attention_mask" in parameters(model.hf)
        alone = all(each.text is None and each.ids is None for each in examples)
        if heard_mask is not None and takes and alone and not bool(heard_mask.all()):
            found["attention_mask"] = heard_mask
    return found


def _films(model: Opened, pictures: Sequence[list[Any]]) -> dict[str, Tensor]:
    """Films [example, frame, channel, height, width]: the pictures of an example are the frames of one."""
    wanted = getattr(model.hf.config, "num_frames", None)
    made = []
    for place, each in enumerate(pictures):
        if not each or len(each) != (wanted or len(pictures[0])):
            raise PromptError(
                f"example {place} has {len(each)} pictures; {model.name} reads the {wanted or len(pictures[0])} frames "
                "of a film in each example"
            )
        frames = read((f"frame {n} of example {place}", one) for n, one in enumerate(each))
        made.append(pixels_of(model.processor, frames, model.name))
    films = {
        name: [one[name] if one[name].dim() == 5 else one[name][None] for one in made] for name in made[0]
    }
    return {name: _joined(name, each) for name, each in films.items()}


def _known(model: Opened, made: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those of a processor's outputs that the model reads."""
    return {name: given for name, given in made.items() if name in names(model.hf)}


def _writes(model: Opened, examples: Sequence[Example]) -> bool:
    """Whether the processor writes the tokens that stand for pictures into these texts."""
    both = all(hasattr(model.processor, name) for name in ("image_processor", "tokenizer"))
    texts = all(each.text is not None for each in examples)
    return both and texts and model.image_token is not None and any(each.images for each in examples)


def _prompts(
    model: Opened, examples: Sequence[Example], side: str, prepend_bos: bool | None, generating: bool
) -> tuple[Any, Inputs]:  # fmt: skip
    """The texts, or ids with their mask, and what the processor gives beside them."""
    if _writes(model, examples):
        return _written(model, examples, side, prepend_bos, generating)
    texts, ids = _all_or_none(examples, "text"), _all_or_none(examples, "ids")
    if ids is not None:
        padded, mask = _padded(model, ids, side)
        return padded, Inputs(None, mask, {})
    if texts is None and model.vocab and not model.is_encoder_decoder and not _names(examples):
        marked = (
            ""
            if model.image_token is None
            else f", with {model.to_strings([model.image_token])[0]} for its picture"
        )
        raise PromptError(f"example 0 has no text, and {model.name} reads one; give text= or ids={marked}")
    return texts, Inputs(None, None, {})


def _written(
    model: Opened, examples: Sequence[Example], side: str, prepend_bos: bool | None, generating: bool
) -> tuple[Tensor, Inputs]:  # fmt: skip
    """Ids of every text with its pictures, and what else the model's processor makes of both."""
    made = []
    for place, each in enumerate(examples):
        pictures = read((f"picture {n} of example {place}", one) for n, one in enumerate(each.images))
        made.append(_one(model, each.text, pictures, place, generating))
    begins = model.prepend_bos if prepend_bos is None else prepend_bos
    written = [one["input_ids"][0].tolist() for one in made]
    rows = [_begun(model, ids, begins) for ids in written]
    more: dict[str, Tensor] = {}
    for name in dict.fromkeys(chain.from_iterable(made)):
        found = [one[name] for one in made if name in one]
        if name not in names(model.hf) or name == "input_ids":
            continue
        pairs = zip(found, written, strict=False)
        if len(found) == len(rows) and all(tuple(one.shape) == (1, len(ids)) for one, ids in pairs):
            more[name] = _beside(found, rows, side)
        else:
            more[name] = _joined(name, found)
    ids, mask = _padded(model, rows, side)
    return ids, Inputs(None, mask, more)


def _beside(given: Sequence[Tensor], rows: Sequence[list[int]], side: str) -> Tensor:
    """One number for each token (which of them stand for a picture), on `side` padded as the rows are, with 0; a
    beginning that was put before a text or taken from it has its number put or taken."""
    longest = max(map(len, rows))
    padded = []
    for one, row in zip(given, rows, strict=True):
        own = torch.nn.functional.pad(one[0], (len(row) - one.shape[1], 0))
        gap = longest - len(row)
        padded.append(torch.nn.functional.pad(own, (gap, 0) if side == "left" else (0, gap)))
    return torch.stack(padded)


def _one(model: Opened, text: Any, pictures: list[Any], place: int, generating: bool) -> Mapping[str, Tensor]:
    options: dict[str, Any] = {}
    if not is_single(text):
        raise PromptError(f"example {place} holds {short(text)}; its text is one text or one conversation")
    try:
        if not isinstance(text, str):
            text = model.processor.apply_chat_template(text, tokenize=False, add_generation_prompt=generating)
            options["add_special_tokens"] = False
        made = model.processor(text=[text], images=pictures or None, return_tensors="pt", **options)
    except Exception as error:  # processors raise many kinds
        told = " ".join(str(error).split())
        raise PromptError(
            f"the processor of {model.name} can not read example {place}: {type(error).__name__}: {told:.200}"
        ) from None
    if pictures and not (made["input_ids"] == model.image_token).any():
        token = model.to_strings([model.image_token or 0])[0]
        raise PromptError(
            f"the text of example {place} does not say where its picture stands; write {token} there"
        )
    return made


def _begun(model: Opened, ids: list[int], begins: bool | None) -> list[int]:
    first = beginning(model.tokenizer)
    if begins is None or first is None:
        return ids
    rest = ids[1:] if ids[:1] == [first] else ids
    return [first, *rest] if begins else rest


def _padded(model: Opened, rows: Sequence[Any], side: str) -> tuple[Tensor, Tensor | None]:
    """Rows of ids as [batch, position], and their mask where they are unequally long."""
    found = [_row(each) for each in rows]
    longest = max(map(len, found))
    if min(map(len, found)) == longest:
        return torch.stack(found), None
    ids = torch.full((len(found), longest), pad_id(model.tokenizer, model.vocab))
    mask = torch.zeros(len(found), longest, dtype=torch.bool)
    for place, row in enumerate(found):
        span = slice(longest - len(row), None) if side == "left" else slice(0, len(row))
        ids[place, span], mask[place, span] = row, True
    return ids, mask


def _row(given: Any) -> Tensor:
    try:
        row = torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError):
        raise PromptError(f"ids of an example are whole numbers [position]; got {short(given)}") from None
    row = row[0] if row.dim() == 2 and len(row) == 1 else row
    if row.dim() != 1 or not len(row) or row.is_floating_point() or row.dtype == torch.bool:
        raise PromptError(
            f"ids of an example are whole numbers [position]; got {row.dtype} {list(row.shape)}"
        )
    return row.long().as_subclass(Tensor)


def _decoders(model: Opened, examples: Sequence[Example]) -> dict[str, Any]:
    """What the decoder reads, as texts or padded ids."""
    given = _all_or_none(examples, "decoder")
    if given is None:
        return {}
    if all(isinstance(each, str) for each in given):
        return {"decoder_input_ids": given}
    ids, mask = _padded(model, given, "right")
    return {"decoder_input_ids": ids} | ({} if mask is None else {"decoder_attention_mask": mask})


def written_form(model: Opened, given: Any) -> Any:
    """A prompt of the form in which what was generated is given back: texts for examples, if there is a tokenizer."""
    examples = _examples(model, given)
    if examples is None:
        return given
    if model.tokenizer is None or any(each.ids is not None for each in examples):
        return torch.zeros(1, 1, dtype=torch.long)
    return [""] * len(examples) if isinstance(given, list) else ""
