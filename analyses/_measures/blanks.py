"""The token that takes the place of a removed token."""

from __future__ import annotations

from typing import Annotated

from headwater.lens.errors import AnalysisError
from headwater.lens.model import HookedModel
from headwater.lens.models.token_ids import token_id

BlankSetting = Annotated[str | None, "token that takes a token's place; none: the mask or the unknown token"]


def blank_id(model: HookedModel, blank: str | None) -> int:
    """The blank's id: as named, else [MASK] of a bidirectional model, else unknown, pad or end of text."""
    if blank is not None:
        return token_id(model, blank, "blank")
    names = ("unk_token_id", "pad_token_id", "eos_token_id")
    names = names if model.causal else ("mask_token_id", *names)
    known = (getattr(model.tokenizer, name, None) for name in names)
    found = next((one for one in known if one is not None and 0 <= one < model.vocab), None)
    if found is None:
        raise AnalysisError(f"{model.name} has no token for a blank; name one, e.g. blank='#0' for token 0")
    return found
