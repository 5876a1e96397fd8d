"""What `vision_guided.py` asks of the attention of `t2i-digits`: losses for two groups of words and two regions."""

import torch

from headwater.lens import losses

WORDS = [[1, 2], [4, 5]]  # "bright three and dim seven": the words of each digit
COLUMNS = torch.arange(8).expand(4, 8)
SIDES = torch.stack([COLUMNS < 3, COLUMNS > 4])  # the two columns between them are background
SCATTERED = SIDES.flatten(1)[:, torch.randperm(32, generator=torch.Generator().manual_seed(0))].view(2, 4, 8)


def weights(record, part):
    view = record.parts.get(part, record)
    return torch.stack([view.pattern(layer) for layer in view.layers])


def overlap(record):
    return losses.overlap_loss(losses.picture_maps(record.part("cross")), WORDS)


def refocus(at):
    return lambda record: (
        losses.refocus_self_loss(weights(record, "self").mean(0), at)
        + losses.refocus_cross_loss(
            losses.picture_maps(record.part("cross")), WORDS, at, text=slice(1, None), smooth=False
        )
    )


def bounded(at):
    return lambda record: (
        1.5 * losses.bounded_loss(weights(record, "cross"), at, WORDS)
        + 0.5 * losses.bounded_loss(weights(record, "self"), at)
    )
