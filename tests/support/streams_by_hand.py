"""The residual stream of the tiny models by hooks on their blocks, and a record whose stream is planted."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

import headwater as hw

KEEP = ("qkv", "residual")


def streams(pair, text: torch.Tensor, kept: torch.Tensor) -> np.ndarray:
    """[layer, token, d] of one text alone: what enters each block, and what leaves the last one."""
    found = []
    blocks = pair.twin.get_submodule(
        {"gpt2": "transformer.h", "bert": "bert.encoder.layer"}.get(
            pair.twin.config.model_type, "model.layers"
        )
    )
    hooks = [
        b.register_forward_pre_hook(lambda _, a, k: found.append(a[0]), with_kwargs=True) for b in blocks
    ]
    hooks.append(blocks[-1].register_forward_hook(lambda _, a, out: found.append(out)))
    with torch.no_grad():
        pair.twin(text[kept][None])
    for hook in hooks:
        hook.remove()
    return np.stack([(x[0] if isinstance(x, tuple) else x)[0].double().numpy() for x in found])


def planted() -> hw.Record:
    """A record of 24 layers, whose tokens' streams are set by hand: token 0 rises behind block 2 and falls in block 21.

    Token 4 is in its direction at layers 6 to 12, token 5 at 10 to 11, token 6 all along.
    """
    model = hw.load("tasks-4l")
    record = model.record(torch.arange(3, 11)[None], keep=KEEP)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(25, 1, 8, 128, generator=generator)
    sink = torch.zeros(128)
    sink[[5, 9]] = torch.tensor([3000.0, -100.0])
    x[3:22, 0, 0] += sink
    x[6:13, 0, 4] -= sink  # the other way round counts too
    x[10:12, 0, 5] += sink / 10
    x[3:22, 0, 6] += sink
    names = [*range(24), "final"]
    layers = list(range(24))
    return replace(
        record, layers=layers, residuals=dict(zip(names, x, strict=True)),
        maps=dict.fromkeys(layers, record.maps[0]), statistics={},
    )  # fmt: skip
