"""Where the weights of a model lie: a model is read whole, on one device.

Records, maps and edits of layers are put together, which was never tried across devices; so a model that is spread over
several is refused when it is opened, and not somewhere in an analysis.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from headwater.lens.errors import ModelError


def refuse_divided(weights: Iterable[tuple[str, Any]], name: str) -> None:
    """ModelError for weights that are cut over devices, or lie on several; those that are offloaded are left out."""
    devices: dict[str, str] = {}
    for key, weight in weights:
        if hasattr(weight, "device_mesh"):
            raise ModelError(
                f"the weights of {name} are cut over devices (tp_plan, FSDP), first {key}; load it whole, on one "
                "device"
            )
        if isinstance(weight, nn.Parameter) and not weight.is_meta:
            devices.setdefault(str(weight.device), key)
    if len(devices) > 1:
        where = ", ".join(f"{device} from {key}" for device, key in devices.items())
        raise ModelError(
            f"the weights of {name} lie on several devices (device_map): {where}; load it on one, such as "
            "device_map={'': 0}, on fewer bits if need be"
        )
