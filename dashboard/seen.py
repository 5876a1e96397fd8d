"""What a model that reads pictures says of one: the record of a part, and the picture as the model saw it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import streamlit as st
import torch
import xarray as xr

import headwater as hw
from headwater.dashboard import runs
from headwater.lens.errors import PromptError
from headwater.lens.examples.processor import FILES
from headwater.lens.examples.sample_pictures import sample_pictures
from headwater.lens.media.pictures import picture
from headwater.lens.models.embedded import embedded
from headwater.lens.trained.registry import TRAINED, is_added

MOST_BYTES = 2**24  # of an uploaded file
FIRST = "vit-digits"  # of those that come with Headwater
KINDS = ("png", "jpg", "jpeg", "webp", "bmp", "gif", "tif", "tiff")


@dataclass(frozen=True)
class Seen:
    """`records` by part; `pixels` is the picture as the model saw it, None of a film or of several pictures."""

    records: dict[str, hw.Record]
    pixels: np.ndarray | None

    def grid(self, part: str) -> tuple[int, int, int] | None:
        """Frames, rows and columns of the patches that a part sees, whichever side they stand on; None without."""
        record = self.records[part]
        for axis in (record.key_axis, record.query_axis):
            if axis.grids and axis.grids[0]:
                return axis.grids[0][0].shape
        return None

    def words(self, part: str) -> dict[str, int]:
        """Positions of the tokens that are no patches, by a name that says the position too; {} where all are."""
        patches, axis = self._patches(part)
        places = axis.valid[0].nonzero()[:, 0].tolist()
        return {f"{n} {axis.strings[0][n]}": i for i, n in enumerate(places) if n not in patches}

    def patches(self, part: str) -> dict[str, int]:
        """Positions of the patches, where they look at each other."""
        patches, axis = self._patches(part)
        return {f"patch {axis.strings[0][n]}": n for n in sorted(patches)}

    def _patches(self, part: str) -> tuple[set[int], Any]:
        """Which tokens of the axis that holds words are patches, and that axis."""
        record = self.records[part]
        axis = record.query_axis if record.key_axis.grids and record.key_axis.grids[0] else record.key_axis
        patches = {n for grid in (axis.grids[0] if axis.grids else ()) for n in grid.tokens().tolist()}
        return patches, axis


def names() -> list[str]:
    """Models that read pictures: those that were given first, then those that come with Headwater, then added ones."""
    own = [name for name, each in embedded().items() if each["reads"] == "pictures"]
    given = [
        name for name in reversed(runs.given()) if name in own or _sees(Path(runs.source(name)).expanduser())
    ]
    added = [name for name, each in TRAINED.items() if each.reads == "pictures" and is_added(name)]
    return list(dict.fromkeys([*given, *sorted(own, key=lambda name: (name != FIRST, name)), *added]))


def _sees(folder: Path) -> bool:
    return any((folder / name).is_file() for name in FILES)


def samples(name: str) -> dict[str, hw.Example]:
    return sample_pictures(name)


def uploaded(data: bytes) -> Any:
    """An uploaded picture, within limits. PromptError for what is none or too large."""
    if len(data) > MOST_BYTES:
        raise PromptError(f"the file has {len(data):,} bytes; the most is {MOST_BYTES:,}")
    return picture(data, "the uploaded file")


def of(name: str, text: str, image: Any) -> Seen:
    """The run of a model on a text (empty: none) and a picture, or the frames of a film; kept by its content."""
    frames = image if isinstance(image, list) else [image]
    digest = hashlib.sha256()
    for each in frames:
        digest.update(repr((each.mode, each.size)).encode() + each.tobytes())
    return _of(name, text, digest.hexdigest(), frames if isinstance(image, list) else image)


@st.cache_resource(max_entries=6, show_spinner="Running the model …", show_time=True)
def _of(name: str, text: str, digest: str, _image: Any) -> Seen:
    model = runs.resident(name)

    def work() -> Seen:
        with torch.no_grad():
            tokens = model.to_tokens(hw.Example(text=text or None, image=_image))
            record = model.record(tokens)
        parts = {next(iter(model.parts)): record, **record.parts}
        shown = {part: each for part, each in parts.items() if any(each.grids) or any(each.key_axis.grids)}
        if not shown:
            raise PromptError(f"no part of {model.name} has patches on a grid that a picture could lie under")
        return Seen(shown, _pixels(tokens))

    return runs.alone(work)


def _pixels(tokens: Any) -> np.ndarray | None:
    found = getattr(tokens, "more", {}).get("pixel_values", tokens)
    found = torch.as_tensor(found).detach().float().cpu()
    found = found[0] if found.dim() == 4 and len(found) == 1 else found
    return found.numpy() if found.dim() == 3 and found.shape[0] in (1, 3) else None


def word(seen: Seen, part: str, position: int, layer: int, heads: str) -> xr.DataArray:
    """The weight between one token and each patch."""
    return hw.analyses.word_on_picture(seen.records[part], position=position, layers=[layer], heads=heads)


def region(seen: Seen, part: str, box: tuple[int, int, int, int], layer: int, heads: str) -> xr.DataArray:
    """The weight per patch between a box and each word."""
    found = hw.analyses.region_words(seen.records[part], region=box, layers=[layer], heads=heads)
    along = next(dim for dim in ("query", "key") if dim in found.inside.dims)
    inside = found.inside.isel({along: np.isfinite(found.inside.values[0])})
    return inside.assign_attrs(found.attrs, unit="attention weight per patch")
