"""Published changes of attention, each a function that returns edits: `with model.edit(*recipes.off_by_one()):`.

Every docstring states the paper, the formula, the defaults and how well these were checked. Edits are data, so a
recipe's result can be looked at, changed, written down. What a model can not take is refused by name, here or by
`model.edit`.
"""

from headwater.lens.recipes.text import (
    attention_calibration,
    block_groups,
    calibration_heads,
    force_attention,
    guided,
    heavy_hitters,
    off_by_one,
    order_free,
    shifted_groups,
    sink_fixed_groups,
    soft_perturbation,
    streaming,
)
from headwater.lens.recipes.vision import (
    head_reinforcement,
    massive_dimensions,
    visual_emphasis,
    visual_redistribution,
)

__all__ = [
    "attention_calibration", "block_groups", "calibration_heads", "force_attention", "guided", "head_reinforcement",
    "heavy_hitters", "massive_dimensions", "off_by_one", "order_free", "shifted_groups", "sink_fixed_groups",
    "soft_perturbation", "streaming", "visual_emphasis", "visual_redistribution",
]  # fmt: skip
