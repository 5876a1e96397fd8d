"""What this machine offers Headwater: builds, devices, memory, and attention backends that were run, not guessed.

Each backend computes one small grouped-query causal problem per device and is compared with float64 `reference`;
`choices.py` says which one `auto` takes for the problems that models and edits bring, and why.
"""

from __future__ import annotations

import os
import platform
from importlib import metadata
from typing import Any

PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "xarray", "pandas")
OPTIONAL = {
    "streamlit": "dashboard",
    "plotly": "dashboard",
    "triton": "triton",
    "transformer-lens": "transformer-lens",
}
TOLERANCE = (
    1e-4  # float32 and the half-precision tensor cores of a GPU stay far below; a wrong mask is far above
)


def examine() -> dict[str, Any]:
    """Facts about this installation as plain data; `ok` is False when a backend is wrong or no model is embedded."""
    import psutil
    import torch

    from headwater.command.choices import choices
    from headwater.lens.models.embedded import embedded
    from headwater.lens.records.free_memory import free_memory

    devices = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    backends = [trial for device in devices for trial in _trials(device)]
    models = sorted(embedded())
    return {
        "headwater": _version("headwater"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": {
            "version": torch.__version__,
            "build": f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU",
            "threads": torch.get_num_threads(),
        },
        "devices": [_device(device) for device in devices],
        "memory": {"total": psutil.virtual_memory().total, "available": free_memory()},
        "backends": backends,
        "choices": [choice for device in devices[:2] for choice in choices(device)],
        "packages": {name: _version(name) for name in PACKAGES},
        "optional": {name: {"version": _version(name), "extra": extra} for name, extra in OPTIONAL.items()},
        "embedded_models": models,
        "network": _network(),
        "ok": bool(models) and all(trial["ok"] for trial in backends if trial["ran"]),
    }


def _trials(device: str) -> list[dict[str, Any]]:
    """Every backend on one problem: batch 2, four heads over two key heads, 33 tokens (no multiple of a tile)."""
    import torch

    from headwater.kernels.attend import attend
    from headwater.kernels.backends.choose import NAMES
    from headwater.kernels.rules.rule import ScoreRule
    from headwater.kernels.tiles.mask import Mask

    seeded = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 33, 16, generator=seeded) for heads in (4, 2, 2))
    rule = ScoreRule(scale=0.25, mask=Mask(33, 33, right=0))
    expected, _ = attend(q.double(), k.double(), v.double(), rule, backend="reference")
    trials = []
    for name in NAMES:
        trial: dict[str, Any] = {"device": device, "backend": name, "ran": False, "ok": False}
        try:
            found, _ = attend(q.to(device), k.to(device), v.to(device), rule, backend=name)
        except (ValueError, RuntimeError, NotImplementedError) as error:
            trial["reason"] = str(error).splitlines()[0]
        else:
            apart = float((found.cpu().double() - expected).abs().max())
            trial |= {"ran": True, "largest_error": apart, "ok": apart < TOLERANCE}
        trials.append(trial)
    return trials


def _device(name: str) -> dict[str, Any]:
    import torch

    if name == "cpu":
        return {"name": "cpu", "model": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    card = torch.cuda.get_device_properties(name)
    return {"name": name, "model": card.name, "memory": card.total_memory}


def _network() -> dict[str, Any]:
    from huggingface_hub import constants

    return {
        "needed": "only to fetch a hub model that is not in the cache yet",
        "hub": "switched off by HF_HUB_OFFLINE" if constants.HF_HUB_OFFLINE else "allowed",
        "cache": constants.HF_HUB_CACHE,
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
