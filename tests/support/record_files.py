"""Small records, and record files changed by somebody who knows the format."""

from __future__ import annotations

import tiny_models

import headwater as hw
from headwater.lens.records import safetensors_file


def recorded(name, *edits, **settings):
    model = hw.load(tiny_models.tiny(name))
    ids, mask = tiny_models.batch(1)
    with model.edit(*edits):
        return model.record(ids, mask, **settings)


def rewritten(path, change):
    """The file with its header and tensors changed by somebody who knows the format, digests and all."""
    header, tensors = safetensors_file.read(path)
    header.pop("digests")
    change(header, tensors)
    with safetensors_file.RecordFile(path) as file:
        for name, tensor in tensors.items():
            file.add(name, tensor)
        file.finish(header)
