"""What every test shares: one torch thread per process unless told otherwise, no network, a short hypothesis profile.

Two busy threads were slower than one on two cores, and the suite runs one process per core.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import jaxtyping
import torch
from hypothesis import HealthCheck, settings

# the modules whose signatures state shapes: in the tests every call is held to them
jaxtyping.install_import_hook(
    [
        "headwater.kernels.maps.attention_map",
        "headwater.lens.model",
        "headwater.lens.models.weights",
        "headwater.lens.prompts.token_sets",
        "headwater.lens.recipes.text",
        "headwater.lens.recipes.vision",
        "headwater.lens.records.contents",
        "headwater.lens.records.record",
        "headwater.lens.records.sinks",
        "headwater.lens.running.forward",
    ],
    "shape_checks.shapes",
)
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
settings.register_profile(
    "suite", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("suite")
