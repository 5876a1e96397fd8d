"""`token_groups`: which tokens of a prompt are special, image, generated or text tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from headwater.lens.errors import PromptError
from headwater.lens.models.axes import TEXTS, axis
from headwater.lens.models.opened import Opened
from headwater.lens.naming.measured import Measured
from headwater.lens.naming.tokens import Tokens


def token_groups(model: Opened, found: Tokens, prompt: int | None = None) -> dict[str, Tensor]:
    """`HookedModel.token_groups`."""
    part = model.parts[model.part_name]
    keys = axis(part, part.keys, found)
    if keys is None:
        raise PromptError(
            f"the prompt has nothing for the part {part.name!r} of {model.name}; give its input too"
        )
    if part.keys not in TEXTS:
        count = keys.ids.shape[1]
        main = (
            torch.ones(count, dtype=torch.bool) if part.patches is None else part.patches.are_patches(count)
        )
        main = main.expand_as(keys.ids)
        named = found.named.get((part.name, "keys")) if isinstance(found, Measured) else None
        if (
            " and " in part.keys and named is not None and named.grid is not None
        ):  # words and a picture in one row
            picture = torch.zeros(count, dtype=torch.bool)
            picture[named.grid.tokens()] = True
            return {"image": picture.expand_as(keys.ids), "words": ~picture.expand_as(keys.ids)}
        return {"special": ~main, part.keys: main}
    ids, real = keys.ids.cpu(), keys.mask.cpu()
    if "inputs_embeds" in found.more:  # vectors have no ids that could be special
        return {"text": real}
    return groups_of_ids(model, ids, real, prompt)


def groups_of_ids(model: Opened, ids: Tensor, real: Tensor, prompt: int | None = None) -> dict[str, Tensor]:
    """The groups of tokens [batch, position] of a text, whichever part reads it."""
    groups: dict[str, Tensor] = {}
    if prompt is not None:
        groups["generated"] = real & (torch.arange(ids.shape[1]) >= prompt)
    if model.image_token is not None:
        groups["image"] = real & (ids == model.image_token)
    groups["special"] = real & torch.isin(ids, torch.tensor(sorted(_special(model)), dtype=torch.long))
    taken = torch.zeros_like(real)
    for name in list(groups):  # groups do not overlap: generated comes before image, image before special
        groups[name] = groups[name] & ~taken
        taken = taken | groups[name]
    return {**groups, "text": real & ~taken}


def _special(model: Opened) -> set[int]:
    known = getattr(model.tokenizer, "all_special_ids", None)
    if known is not None:
        return {int(i) for i in known}
    text = model.hf.config.get_text_config()
    named = [
        getattr(text, f"{n}_token_id", None) for n in ("bos", "eos", "pad", "decoder_start", "cls", "sep")
    ]
    flat = [i for n in named for i in (n if isinstance(n, list | tuple) else [n])]
    return {i for i in flat if isinstance(i, int)}
