"""Losses over attention weights, with gradients: mass on hidden words, words apart in a picture, words in regions.

`model.record(x, grad=True)` gives weights that carry gradients: `record.pattern(layer)`, or `picture_maps(record)` for
attention from a picture to words. Every loss is one number per example, so that it can be averaged and compared.
"""

from headwater.lens.losses.impermissible import hiding_loss, impermissible_mass, marked
from headwater.lens.losses.regions import bounded_loss, refocus_cross_loss, refocus_self_loss
from headwater.lens.losses.words_in_picture import (
    excite_loss,
    kept_regions,
    overlap_loss,
    picture_maps,
    retention_loss,
)

__all__ = [
    "bounded_loss", "excite_loss", "hiding_loss", "impermissible_mass", "kept_regions", "marked", "overlap_loss",
    "picture_maps", "refocus_cross_loss", "refocus_self_loss", "retention_loss",
]  # fmt: skip
