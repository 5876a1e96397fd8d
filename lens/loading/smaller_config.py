"""The configuration of a model without some of its heads, so that it can be saved and opened again.

A configuration has one number of heads for all layers. Where it can say what is left, it is changed; elsewhere the
model refuses `save_pretrained`, which would write a folder that describes another model.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import torch

from headwater.lens.errors import ModelError
from headwater.lens.models.opened import Opened
from headwater.lens.models.parts import Shape


def settle(smaller: Any, model: Opened, changed: Mapping[str, Sequence[Shape]]) -> None:
    """Write what is left into the configuration of `smaller`, or let it refuse `save_pretrained` with the reason.

    `changed` are the shapes of the layers of the parts of `model` that lost heads.
    """
    vision = {name for name, part in model.parts.items() if part.queries == "image"}
    shapes = [shape for of in changed.values() for shape in of]
    several = {"heads": sorted({s.heads for s in shapes}), "key–value heads": sorted({s.kv for s in shapes})}
    uneven = next((what for what, counts in several.items() if len(counts) > 1), None)
    if uneven is not None:
        counts = " and ".join(map(str, several[uneven]))
        reason = f"its layers keep {counts} {uneven}, and a configuration has one number for all"
    else:
        config = copy.deepcopy(smaller.config)
        reason = _all_changed(config, changed, vision) or _other_model(smaller, config)
    if reason:
        message = (
            f"what is left of {model.name} can not be saved as a folder that opens again: {reason}; take equally many "
            "heads out of every layer, or keep the whole model and the names of the heads"
        )
        smaller.save_pretrained = functools.partial(_refuse, message)
    else:
        _all_changed(smaller.config, changed, vision)


def _all_changed(config: Any, changed: Mapping[str, Sequence[Shape]], vision: set[str]) -> str:
    """Change the counts of each part where the configuration has them; the reason why not."""
    reasons = (
        _changed(
            getattr(config, "vision_config", config) if name in vision else config.get_text_config(), of[0]
        )
        for name, of in changed.items()
    )
    return next((reason for reason in reasons if reason), "")


def _refuse(message: str, *_: Any, **__: Any) -> NoReturn:
    raise ModelError(message)


def _changed(text: Any, shape: Shape) -> str:
    """Change the counts in the configuration of a stack; the reason why not, if it takes none of them."""
    try:
        text.num_attention_heads = shape.heads
        if getattr(text, "num_key_value_heads", None) is not None:
            text.num_key_value_heads = shape.kv
        text.head_dim = shape.d_head  # many modules read it where their configuration does not list it
    except (AttributeError, NotImplementedError, TypeError, ValueError) as error:
        return _last_line(error)
    return ""


def _other_model(smaller: Any, config: Any) -> str:
    """How the model that `config` describes differs from `smaller`: in shapes, or in numbers that modules hold."""
    try:
        config = type(config).from_dict(config.to_dict())  # as it is read from a file
        with torch.device("meta"):
            again = type(smaller)._from_config(config)
    except (
        Exception
    ) as error:  # configurations have errors of their own, such as for widths that do not divide
        return _last_line(error)
    mine, described = ({n: t.shape for n, t in hf.state_dict().items()} for hf in (smaller, again))
    for path in mine.keys() | described.keys():
        if mine.get(path) != described.get(path):
            return f"its configuration has no number for what {path} keeps"
    own = dict(smaller.named_modules())
    for path, module in again.named_modules():
        for field, value in _numbers(module).items():
            if field in vars(own[path]) and vars(own[path])[field] != value:
                return (
                    f"its configuration makes {field} of {path} {value}, and it is {vars(own[path])[field]}"
                )
    return ""


def _numbers(module: Any) -> dict[str, Any]:
    plain = {n: v for n, v in vars(module).items() if isinstance(v, int | float) and not n.startswith("_")}
    return {name: value for name, value in plain.items() if name != "training"}


def _last_line(error: Exception) -> str:
    last = str(error).strip().rpartition("\n")[2]
    return f"{type(error).__name__}: {last}"
