"""Which heads of DINOv2 does the class token of a photograph depend on?"""

import json
import sys
from datetime import date
from functools import partial
from pathlib import Path

import _kept
import numpy as np
import skimage.data
import torch
import xarray as xr
from PIL import Image, ImageOps

import headwater as hw
from headwater import analyses

SEED, QUICK, SIZE = 0, "--quick" in sys.argv, 112  # pixels: 8 × 8 patches
rng, model, folder = np.random.default_rng(SEED), hw.load("dinov2-small"), Path(skimage.data.__file__).parent
NAMES = ["chelsea.png", "astronaut.png", "coffee.png", "rocket.jpg", "motorcycle_left.png", "camera.png"]
opened = [Image.open(folder / name).convert("RGB") for name in NAMES[: 2 if QUICK else 6]]
shown = np.stack([ImageOps.fit(picture, (SIZE, SIZE)) for picture in opened]) / 255
x = torch.tensor((shown - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]).float().permute(0, 3, 1, 2)
layers = model.layers[:2] if QUICK else model.layers
heads = np.array([f"{layer}.{head}" for layer in layers for head in range(model.n_heads)])
interval = partial(_kept.interval, seed=rng)  # the mean, and 95 % of the means of redrawn photographs


def change(some):  # 1 - cosine of the class token with itself, when the output of these heads is 0
    with model.edit(hw.AblateHeads(list(some))):
        return (1 - torch.cosine_similarity(model.embeddings(x)[:, 0], own)).numpy()


own = model.embeddings(x)[:, 0]
alone = np.stack([change([head]) for head in heads], 1)  # [photograph, head]
order, half = alone.mean(0).argsort(), len(x) // 2
told = {"photographs": len(x), "heads": len(heads)}
told["the ten that matter most"] = {str(heads[n]): interval(alone[:, n]) for n in order[:-11:-1]}
told["agreement of the two halves"] = analyses.between(
    *(alone[s].mean(0) for s in (slice(half), slice(half, None)))
)
count = len(heads) // 6
told["removed together"] = count
groups = {"that matter least": order[:count], "that matter most": order[-count:]}
groups |= {f"by chance, {n}": rng.permutation(len(heads))[:count] for n in range(1 if QUICK else 5)}
told |= {f"change without those {name}": interval(change(heads[some])) for name, some in groups.items()}
attrs = analyses.rollout(model.record(x[:1])).attrs
told |= {name: attrs[name] for name in ("model", "revision", "headwater", "torch", "machine")}
print("\n".join(f"{name}: {value}" for name, value in told.items()))
if len(sys.argv) > 1 and not sys.argv[1].startswith("-"):
    told |= {"seed": SEED, "date": str(date.today())}
    Path(sys.argv[1], "real_picture_heads.json").write_text(json.dumps(told, indent=1) + "\n", "utf-8")
    places = {"layer": layers, "head": np.arange(model.n_heads)}
    grid = xr.DataArray(alone.mean(0).reshape(len(layers), -1), places, attrs={"unit": "1 - cosine"})
    title = "How far does the class token turn without a head?"
    hw.figure(grid, title=title).write_image(Path(sys.argv[1], "real_picture_heads.svg"))
