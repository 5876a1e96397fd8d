"""Which tokens of a prompt are its image."""

from __future__ import annotations

from jaxtyping import Bool
from torch import Tensor

from headwater.lens.edits.named_positions import Names
from headwater.lens.errors import EditError
from headwater.lens.model import HookedModel
from headwater.lens.naming.positions import Positions
from headwater.lens.naming.tokens import Tokens
from headwater.lens.records.recorder import key_positions


def image_tokens(model: HookedModel, tokens: Tokens, image: Positions) -> Bool[Tensor, "batch position"]:
    """The image tokens of each row, bool [batch, position]; EditError where no row has one."""
    Names(model).check(image, "image")
    if isinstance(image, str) and image != "all":
        picked = model.token_groups(tokens)[image]
    else:
        picked = key_positions(image, tokens)
    if not picked.any():
        raise EditError(f"the prompt has no image tokens; {model.name} must be given an image with its text")
    return picked.cpu()
