"""DAMRO on vlm-digits: decoding against a run that sees the tower's outlier patches alone, or random ones."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import xarray as xr
from _digits_said import COUNT, compare, example, plain, rng

import headwater as hw

KEPT = 2  # of 16 patches; the paper keeps 10 of 576
model = hw.load("vlm-digits")
given = model.to_tokens([example(n, "what is there ?") for n in range(COUNT)])
outliers = hw.recipes.outlier_patches(model, given, count=KEPT)
chosen = np.bincount(outliers.flatten(), minlength=16) / COUNT
print(f"share of pictures of which a patch is one of {KEPT} outliers, row by row; at random {KEPT / 16:.3f}")
for row in chosen.reshape(4, 4):
    print("  " + " ".join(f"{share:.2f}" for share in row))


def damro(alpha: float) -> Any:
    return lambda given: ([], hw.recipes.damro(model, given, count=KEPT, alpha=alpha))


def random_patches(given: list[hw.Example]) -> tuple[list[Any], Any]:
    patches = [rng.sample(range(16), KEPT) for _ in given]
    return [], hw.recipes.damro(model, given, alpha=1.0, patches=patches)


ways = {"plain": plain, "DAMRO, alpha 0.5": damro(0.5), "DAMRO, alpha 1": damro(1.0)}
compare(model, ways | {"random patches, alpha 1": random_patches})

if len(sys.argv) > 1:
    shares = xr.DataArray(chosen.reshape(4, 4), dims=("row", "column"), name="share of pictures")
    drawn = hw.figure(shares, title="Which patches does the tower's class token attend to most?")
    drawn.write_image(f"{sys.argv[1]}/vision_damro.svg")
