"""Attention rules that a model folder declares for its own weights: a normaliser, a learned key and value.

They stand in config.json as `"headwater_attention": {"normaliser": "sigmoid", "kv_bias": true}`. The learned keys and
values are in `attention.safetensors`, as `model.layers.L.self_attn.bias_key` and `bias_value`, [head, d_head] each.
`attach` puts the rule on the attention modules (`attention/own_rule.py`). transformers does not know these rules and
would run the model with plain softmax.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from headwater.kernels.rules.normaliser import Normaliser
from headwater.lens.attention.own_rule import ATTRIBUTE, OwnRule, own_rule
from headwater.lens.errors import ModelError, first_line
from headwater.lens.models.opened import Opened

FIELD, FILE = "headwater_attention", "attention.safetensors"
MOST_BYTES = 2**26


def declared(folder: Path) -> dict[str, Any]:
    """The declaration in a folder's config.json; empty if there is none, or only softmax."""
    found = json.loads((folder / "config.json").read_text(encoding="utf-8")).get(FIELD) or {}
    return {} if found == {"normaliser": "softmax"} else found


def described(model: Opened) -> str:
    """The declared rule in words; empty where the model has none."""
    rule = own_rule(model.attention_module(model.layers[0]))
    if rule is None:
        return ""
    name = "softmax" if rule.normaliser is None else rule.normaliser.name
    return name if rule.key is None else f"{name}, a learned key and value per head"


def attach(model: Opened, folder: Path) -> None:
    """Read the declaration of a folder and put the rule on the attention modules; ModelError says what is wrong."""
    found = getattr(model.hf.config, FIELD, None)
    if found is None:
        return
    if not isinstance(found, dict) or not set(found) <= {"normaliser", "kv_bias"}:
        raise ModelError(f"{folder}: {FIELD} takes normaliser and kv_bias; got {found!r}")
    normaliser = _normaliser(found.get("normaliser", "softmax"), folder)
    learned = found.get("kv_bias", False)
    if learned not in (True, False) or (learned and normaliser is not None and normaliser.name != "softmax1"):
        raise ModelError(f"{folder}: kv_bias is true or false, and goes with a softmax; got {found!r}")
    for layer in model.layers:
        shape = model.shape(layer)
        key, value = _learned(folder, layer, shape.heads, shape.d_head) if learned else (None, None)
        setattr(model.attention_module(layer), ATTRIBUTE, OwnRule(normaliser, key, value))


def _normaliser(given: Any, folder: Path) -> Normaliser | None:
    parameters: Any = {"name": given} if isinstance(given, str) else given
    if not isinstance(parameters, dict):
        raise ModelError(f"{folder}: normaliser is a name or an object with its name; got {given!r}")
    try:
        found = Normaliser(**parameters)
    except (TypeError, ValueError) as error:
        raise ModelError(f"{folder}: {error}") from None
    return None if found.name == "softmax" else found


def _learned(folder: Path, layer: int, heads: int, width: int) -> tuple[Tensor, Tensor]:
    path = folder / FILE
    if not path.is_file() or path.stat().st_size > MOST_BYTES:
        raise ModelError(f"{folder} declares kv_bias but has no {FILE} of at most {MOST_BYTES} bytes")
    names = [f"model.layers.{layer}.self_attn.bias_{part}" for part in ("key", "value")]
    try:
        with safe_open(path, "pt") as file:
            found = [file.get_tensor(name) for name in names]
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path}: {first_line(error)}") from None
    for name, tensor in zip(names, found, strict=True):
        if (
            tuple(tensor.shape) != (heads, width)
            or not tensor.is_floating_point()
            or not tensor.isfinite().all()
        ):
            raise ModelError(
                f"{path}: {name} must be finite numbers [{heads}, {width}]; got {list(tensor.shape)}"
            )
    return found[0], found[1]
