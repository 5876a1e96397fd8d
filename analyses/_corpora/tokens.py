"""A text of a corpus as token ids: one that is longer than what is read is cut at its end."""

from __future__ import annotations

from headwater.lens.errors import AnalysisError, ModelError
from headwater.lens.model import HookedModel
from headwater.lens.naming.texts import rows


def fitting(model: HookedModel, length: int | None) -> int:
    """The most tokens of a text that are read: `length`, or the model's context.

    ModelError for a model without a tokenizer, AnalysisError for a length that it does not hold.
    """
    if model.tokenizer is None:
        raise ModelError("the model was loaded without a tokenizer; a corpus of texts needs one")
    if length is not None and (type(length) is not int or length < 2):
        raise AnalysisError(f"length is a whole number, at least 2; got {length!r}")
    found = length or model.context or 0
    if not found or (model.context and found > model.context):
        raise AnalysisError(
            f"length={found} does not fit; {model.name} holds {model.context or 'any number of'} tokens"
        )
    return found


def tokens_of(model: HookedModel, text: str, length: int) -> tuple[list[int], bool]:
    """The ids of a text, and whether it was cut. A special token that closes a text closes the cut one too."""
    ids = rows([text], model.tokenizer, model.prepend_bos)[0].ids
    if len(ids) <= length:
        return ids, False
    closed = ids[-1] in getattr(model.tokenizer, "all_special_ids", ())
    return ([*ids[: length - 1], ids[-1]] if closed else ids[:length]), True
