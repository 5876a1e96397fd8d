"""Rules of attention that belong to a model and not to its architecture: a normaliser, a learned key and value.

A folder declares them in config.json, `"headwater_attention": {"normaliser": "sigmoid", "kv_bias": true}`, with the
learned keys and values in `attention.safetensors` as `model.layers.L.self_attn.bias_key` and `bias_value`, each
[head, d_head]. A learned key is one more key that every query sees. Its value is not the text's, so it is no column of
a map: it is a sink whose logit depends on the query (rows sum to less than 1), and its value is added to the output.
The rule stays on the module, as weights do; transformers alone would run the model without it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from headwater.kernels.maps.attention_map import AttentionMap
from headwater.kernels.rules.normaliser import Normaliser
from headwater.kernels.rules.rule import ScoreRule
from headwater.lens.errors import ModelError

if TYPE_CHECKING:
    from headwater.lens.model import HookedModel

FIELD, FILE, ATTRIBUTE = "headwater_attention", "attention.safetensors", "headwater_rule"
MOST_BYTES = 2**26


@dataclass(frozen=True, eq=False)
class OwnRule:
    """`key` and `value` are [head, d_head]; None where nothing is learned."""

    normaliser: Normaliser | None = None
    key: Tensor | None = None
    value: Tensor | None = None

    def applied(self, q: Tensor, rule: ScoreRule) -> ScoreRule:
        """The rule with this normaliser, unless an edit brought its own, and with the learned key as a sink."""
        if rule.normaliser is None:
            rule = replace(rule, normaliser=self.normaliser)
        if self.key is None:
            return rule
        logits = rule.scale * torch.einsum("bhqd,hd->bhq", q, self.key.to(q))
        if rule.sinks is not None:
            raise ModelError("a learned key beside learned sinks is not known")
        return replace(rule, sinks=logits)

    def added(self, z: Tensor, map: AttentionMap, rule: ScoreRule) -> Tensor:
        """z with the learned value's part, `exp(sink - L) * value`; rows without weights get nothing."""
        if self.value is None or rule.sinks is None:
            return z
        share = torch.exp(rule.sinks.to(map.lse) - map.lse)
        return z + (share[..., None] * self.value.to(share)[:, None]).to(z)


def of(module: nn.Module) -> OwnRule | None:
    """The rule that a module carries."""
    return getattr(module, ATTRIBUTE, None)


def declared(folder: Path) -> dict[str, Any]:
    """What a folder's config says; empty where it says nothing but softmax."""
    found = json.loads((folder / "config.json").read_text(encoding="utf-8")).get(FIELD) or {}
    return {} if found == {"normaliser": "softmax"} else found


def described(model: HookedModel) -> str:
    """The rule in words, empty where the architecture's own is used."""
    rule = of(model.attention_module(model.layers[0]))
    if rule is None:
        return ""
    name = "softmax" if rule.normaliser is None else rule.normaliser.name
    return name if rule.key is None else f"{name}, a learned key and value per head"


def attach(model: HookedModel, folder: Path) -> None:
    """Read what a folder declares and put it on the attention modules; ModelError names what is wrong."""
    declared = getattr(model.hf.config, FIELD, None)
    if declared is None:
        return
    if not isinstance(declared, dict) or not set(declared) <= {"normaliser", "kv_bias"}:
        raise ModelError(f"{folder}: {FIELD} takes normaliser and kv_bias; got {declared!r}")
    normaliser = _normaliser(declared.get("normaliser", "softmax"), folder)
    learned = declared.get("kv_bias", False)
    if learned not in (True, False) or (learned and normaliser is not None and normaliser.name != "softmax1"):
        raise ModelError(f"{folder}: kv_bias is true or false, and goes with a softmax; got {declared!r}")
    for layer in model.layers:
        key, value = _learned(folder, layer, model.n_heads, model.d_head) if learned else (None, None)
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
        raise ModelError(f"{path}: {str(error).splitlines()[0]}") from None
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
