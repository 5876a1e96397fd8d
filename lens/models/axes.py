"""`axis`: the tokens on the query axis or the key axis of one part, for the inputs of one call."""

from __future__ import annotations

import torch
from torch import Tensor

from headwater.lens.models.part_axes import CONSTANT
from headwater.lens.models.parts import Part
from headwater.lens.models.signature import FLOATS
from headwater.lens.naming.measured import Measured
from headwater.lens.naming.tokens import Tokens

TEXTS = ("text", "encoder", "decoder")  # axes whose tokens have ids; the others are images and audio


def axis(part: Part, name: str, tokens: Tokens) -> Tokens | None:
    """The tokens of one axis; None if the inputs lack it, as text without an image lacks "image"."""
    if isinstance(tokens, Measured):
        return tokens.axes.get((part.name, "queries" if name == part.queries else "keys"))
    if name in ("text", "decoder"):
        return tokens
    if name == "encoder":
        ids = tokens.more.get("input_ids")
        if ids is None:
            return None
        mask = tokens.more.get("attention_mask")
        return Tokens(ids, torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool())
    floats = [t for n, t in tokens.more.items() if n in FLOATS]
    if name in CONSTANT:
        if part.beside and not floats:
            return None
        return counted(len(tokens) or len(floats[0]), part.counts[name])
    given = next((t for n, t in tokens.more.items() if FLOATS.get(n) == name), None)
    if given is None:
        return None
    batch, count = len(given), part.counts.get(name) or round(given.shape[part.time] / part.stride)
    mask, real = tokens.more.get("attention_mask"), None
    if name == "audio" and part.lengths is not None:
        count = int(part.lengths(given.shape[part.time]))
        if mask is not None and mask.shape == (batch, given.shape[part.time]):  # of samples or frames
            ends = torch.tensor([int(part.lengths(samples)) for samples in mask.sum(-1).tolist()])
            real = torch.arange(count) < ends[:, None]
    elif name == "audio" and given.dim() == 3 and mask is not None and mask.shape == given.shape[:2]:
        count = given.shape[1]  # frames stand before their features, each with its mask (Wav2Vec2-BERT)
    if name == "image" and given.dim() == 2:  # patches of all images in one row
        batch, count = 1, len(given)
    elif name == "image" and part.patches is not None:
        batch = len(given) if part.patches.depth else given[..., 0, 0, 0].numel()
        count = part.patches.count(given)
    if mask is not None and mask.shape == (batch, count) and "input_ids" not in tokens.more:
        real = mask.bool()
    elif "flattened_patches" in tokens.more and name == "image":  # those of padding are zero
        real = given.sum(-1) != 0
    return counted(batch, count, real)


def counted(batch: int, count: int, real: Tensor | None = None) -> Tokens:
    """Tokens that are not text: numbered from 0, [batch, count]; `real` marks those that are no padding (None: all)."""
    ids = torch.arange(count).expand(batch, -1).contiguous()
    return Tokens(ids, torch.ones_like(ids, dtype=torch.bool) if real is None else real)
