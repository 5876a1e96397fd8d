"""The model that a file names: an embedded or added one, one in the file's folder, or a hub id; nothing elsewhere."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from headwater.lens.errors import ExperimentError
from headwater.lens.files import within

if TYPE_CHECKING:
    from headwater.lens.model import HookedModel

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?")


def load_named(
    name: str, folder: Path | None, dtype: str, file: str = "experiment", prepend_bos: bool | None = None
) -> HookedModel:
    """Open it. ExperimentError where it lies outside of the folder of the `file`."""
    from headwater.lens.loading.load import load
    from headwater.lens.models.embedded import embedded
    from headwater.lens.trained.joined import joined
    from headwater.lens.trained.registry import TRAINED

    precision = getattr(torch, dtype)
    if name in {*embedded(), *TRAINED, *joined()}:
        return load(name, dtype=precision, prepend_bos=prepend_bos)
    if folder is not None and (inside := within(folder, name)) is not None and inside.is_dir():
        return load(inside, dtype=precision, prepend_bos=prepend_bos)
    if not HUB_ID.fullmatch(name) or ".." in name or Path(name).exists():
        raise ExperimentError(
            f"the model {name!r} is none that `headwater models` lists, not in the {file}'s folder, no hub id; give "
            "the model itself (--model FOLDER on the command line)"
        )
    return load(name, dtype=precision, prepend_bos=prepend_bos)
