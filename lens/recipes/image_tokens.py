"""Which tokens of a prompt are its image, and whether any text follows it."""

from __future__ import annotations

from jaxtyping import Bool
from torch import Tensor

from headwater.lens.edits.named_positions import Names
from headwater.lens.errors import EditError
from headwater.lens.model import HookedModel
from headwater.lens.models.axes import TEXTS
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


def require_followed(model: HookedModel, tokens: Tokens, picked: Bool[Tensor, "batch position"]) -> None:
    """EditError where no token stands behind the image of a row, so that none could look back at it."""
    if model.parts[model.part_name].queries not in TEXTS:
        raise EditError(
            f"{model.name} reads no text behind its picture here; give a whole model that reads both"
        )
    for row, (image, real) in enumerate(zip(picked, tokens.mask.cpu(), strict=True)):
        if image.any() and int(image.nonzero()[-1]) >= int(real.nonzero()[-1]):
            raise EditError(
                f"no token stands behind the image of prompt {row}, so none could look back at it; "
                "give an image with a text behind it"
            )
