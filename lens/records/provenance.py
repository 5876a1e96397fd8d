"""`provenance`: the model, the active edits and the library versions, stored with every record and result."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import torch
import transformers

from headwater.lens.attention import context
from headwater.lens.models import declared_rules
from headwater.lens.models.beginning import first_token
from headwater.lens.models.opened import Opened

VERSION = version("headwater")
# attributes that scipy's netCDF writer needs itself, and the methods of a dict: what has the attribute `keys` is taken
# for a mapping by pandas and xarray, and `DataArray.astype` fails
RESERVED = frozenset({"dimensions", *(name for name in dir(dict) if not name.startswith("_"))})


def provenance(model: Opened, given: Any = None, first: str | None = None) -> dict[str, Any]:
    """The provenance of numbers that `model` computes now, in this context; `given` are token ids, None for texts, and
    `first` is the token that begins them, where that is known.

    "not_covered" names what mixes positions and has no attention map; "mixers" are [layer, path, class] of this part,
    "attention_layers" its layers with attention, where not all have it, and "other_attention" what other parts read in
    the same blocks (cross-attention), which products over the layers of this part leave out. "row_sums" says that the
    weights of a row do not sum to 1.
    """
    attention = model.read_only or declared_rules.described(model)
    first = first_token(model, given) if first is None else first
    edits = context.user_edits(model.key)
    sums = dict.fromkeys(told for edit in edits if (told := getattr(edit, "row_sums", "")))
    return {
        "model": model.name, "revision": model.revision,
        "edits": [edit.to_dict() for edit in edits],
        **({"row_sums": "; ".join(sums)} if sums else {}),
        "dtype": str(model.dtype).removeprefix("torch."), "headwater": VERSION, "torch": torch.__version__,
        "transformers": transformers.__version__, "machine": platform.machine(),
        **({"attention": attention} if attention else {}),
        **({"not_covered": list(model.unread)} if model.unread else {}),
        **({"mixers": [[m.layer, m.path, m.name] for m in model.mixers]} if model.mixers else {}),
        **({"other_attention": "; ".join(told)} if (told := model.other_attention) else {}),
        **({"attention_layers": model.layers} if model.n_layers < len(model.stack) else {}),
        **({"tokenizer": told} if (told := model.tokenizer_revision) else {}),
        **({"processor": told} if (told := model.processor_revision) else {}),
        **({"first_token": first} if first else {}),
    }  # fmt: skip


def as_attributes(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """The provenance as attributes of a result: what is not covered as one text."""
    found = {name: value for name, value in provenance.items() if name != "mixers"}
    if isinstance(told := found.get("not_covered"), list):
        found["not_covered"] = "; ".join(map(str, told))
    return free(found)


def free(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """The attributes under names that arrays and netCDF files take: a reserved name ends in "_"."""
    return {f"{name}_" if name in RESERVED else name: value for name, value in attributes.items()}
