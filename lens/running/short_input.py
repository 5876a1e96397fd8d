"""A short input of an open model, on which runs show what its modules do."""

from __future__ import annotations

import torch
from torch import Tensor

from headwater.lens.errors import ModelError
from headwater.lens.models.opened import Opened
from headwater.lens.models.signature import compares

LENGTH = 16


def reads_text_alone(model: Opened) -> bool:
    """Whether the model runs on token ids and nothing else, and this is the part that reads them."""
    main = model.part_name == next(iter(model.parts))
    return main and model.vocab > 0 and not model.is_encoder_decoder and not compares(model.hf)


def short_input(model: Opened, length: int = LENGTH) -> dict[str, Tensor]:
    """One row of `length` token ids; where the model reads more, or this part something else, the inputs on which it
    was opened. ModelError where these are not known."""
    if reads_text_alone(model):
        length = min(model.context or length, length)
        return {"input_ids": ((torch.arange(length)[None] * 7919 + 5) % model.vocab).to(model.device)}
    if not model.sample and not model.stack:
        raise ModelError(
            f"the blocks of {model.name} are not known, so what one part writes to another can not be followed; give a "
            "model of transformers, or change heads with model.edit"
        )
    if not model.sample:
        raise ModelError(
            f"{model.name} was opened without a sample; give one with hw.load(model, sample={{…}})"
        )
    return {
        name: given.to(model.device, model.dtype if given.is_floating_point() else None)
        for name, given in model.sample.items()
    }
