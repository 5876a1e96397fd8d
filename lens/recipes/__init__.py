"""Published changes of attention, each a function that returns edits: `with model.edit(*recipes.off_by_one()):`.

Every docstring states the paper, the formula, the defaults, and against what they were checked. Edits are data, so the
result can be printed, changed and saved. The recipe or `model.edit` raises EditError where the model does not fit.
"""

from headwater.lens.recipes.damro import damro, outlier_patches
from headwater.lens.recipes.paint import sensitive_heads, visual_emphasis, visual_sensitivity
from headwater.lens.recipes.pictures import concept_strengthening
from headwater.lens.recipes.pruned_tokens import flowcut, vflowopt
from headwater.lens.recipes.regions import bounded_attention
from headwater.lens.recipes.text import (
    attention_calibration,
    block_groups,
    calibration_heads,
    force_attention,
    heavy_hitters,
    off_by_one,
    order_free,
    own_category,
    shifted_groups,
    sink_fixed_groups,
    soft_perturbation,
    streaming,
)
from headwater.lens.recipes.vhr import head_reinforcement
from headwater.lens.recipes.video import space_time_knockout
from headwater.lens.recipes.vision import (
    massive_dimensions,
    visual_redistribution,
)
from headwater.lens.running.branches import guided

__all__ = [
    "attention_calibration", "block_groups", "bounded_attention", "calibration_heads", "concept_strengthening",
    "damro", "flowcut", "force_attention", "guided", "head_reinforcement", "heavy_hitters", "massive_dimensions",
    "off_by_one", "order_free", "outlier_patches", "own_category", "sensitive_heads", "shifted_groups",
    "sink_fixed_groups", "soft_perturbation", "space_time_knockout", "streaming", "vflowopt", "visual_emphasis",
    "visual_redistribution", "visual_sensitivity",
]  # fmt: skip
