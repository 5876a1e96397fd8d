"""How far do the heads of DINOv2 look on photographs, and which patches does its class token use?"""

import json
import sys
from datetime import date
from functools import partial
from pathlib import Path

import _kept
import numpy as np
import skimage.data
import torch
from PIL import Image, ImageOps

import headwater as hw
from headwater import analyses

SEED, SIDE, SIZE, N = 0, 16, 14, 1 if "--quick" in sys.argv else 6  # patches across, pixels across one
rng, model, folder = np.random.default_rng(SEED), hw.load("dinov2-small"), Path(skimage.data.__file__).parent
NAMES = ["chelsea.png", "astronaut.png", "coffee.png", "rocket.jpg", "motorcycle_left.png", "camera.png"]
opened = [Image.open(folder / name).convert("RGB") for name in NAMES[:N]]
shown = np.stack([ImageOps.fit(picture, (SIDE * SIZE, SIDE * SIZE)) for picture in opened]) / 255
x = torch.tensor((shown - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]).float().permute(0, 3, 1, 2)
patches = x.unfold(2, SIZE, SIZE).unfold(3, SIZE, SIZE).flatten(2, 3)[:, :, rng.permutation(SIDE**2)]
mixed = patches.unflatten(2, (SIDE, SIDE)).permute(0, 1, 2, 4, 3, 5).reshape(x.shape)  # in other places
interval = partial(_kept.interval, seed=rng)  # the mean, and 95 % of the means of redrawn photographs
own, record = model.embeddings(x)[:, 0], model.record(x, keep=("qk", "residual"))
far, far_mixed = (analyses.patch_distance(each, True).mean_hops for each in (record, model.record(mixed)))
row, column = np.divmod(np.arange(SIDE**2), SIDE)
even = np.maximum(abs(row[:, None] - row), abs(column[:, None] - column)).mean()
told = {"photographs": N, "seed": SEED, "date": str(date.today()), "hops of even attention": round(even, 3)}
told |= {"hops, all heads": interval(far.mean(("layer", "head")))}
told |= {"hops, shuffled": interval(far_mixed.mean(("layer", "head")))}
for layer, hops in enumerate(far.transpose("layer", "head", "batch").values):  # its nearest, its farthest
    told[f"hops, layer {layer}"] = [interval(hops[head]) for head in hops.mean(1).argsort()[[0, -1]]]
last = record.residual(record.layers[-1])[:, 1:].norm(dim=-1)
told["longest patch over the median"] = interval(last.amax(1) / last.median(1).values)
told["massive sinks"] = int(analyses.find_sinks(record, rule="massive").sink.sum())
maps = {"rollout": analyses.rollout(record, 0)}
maps["relevance"] = analyses.relevance(model, x, 0, lambda hidden: (hidden[:, 0] * own).sum(-1))
ranks = {name: torch.tensor(each.values[:, 0, 1:]).float() for name, each in maps.items()}
ranks["the middle"] = -torch.tensor(np.hypot(row - 7.5, column - 7.5)).expand(N, -1)  # two controls
ranks["chance"] = torch.tensor(rng.random((N, SIDE**2)))
for name, each in ranks.items():  # a fifth of the patches becomes grey
    gone = torch.zeros_like(each, dtype=torch.bool).scatter_(1, each.topk(SIDE**2 // 5).indices, True)
    gone = gone.view(N, 1, SIDE, SIDE).repeat_interleave(SIZE, 2).repeat_interleave(SIZE, 3)
    alike = torch.cosine_similarity(model.embeddings(x.masked_fill(gone, 0.0))[:, 0], own)
    told[f"class token without the patches of {name}: 1 - cosine"] = interval(1 - alike)
told |= {name: maps["rollout"].attrs[name] for name in ("model", "revision", "headwater", "torch", "machine")}
print("\n".join(f"{name}: {value}" for name, value in told.items()))
if len(sys.argv) > 1 and not sys.argv[1].startswith("-"):
    Path(sys.argv[1], "real_pictures.json").write_text(json.dumps(told, indent=1) + "\n", "utf-8")
    hw.figure(far.mean("batch"), title="Mean distance").write_image(Path(sys.argv[1], "real_pictures.svg"))
    for name, each in maps.items():
        hw.figure(each.isel(batch=0), image=shown[0]).write_image(Path(sys.argv[1], f"real_{name}.svg"))
