"""HeadHunter on `t2i-digits`: heads to be guided away from, without guidance by words; `vit-digits` is the measure."""

import sys
from pathlib import Path

import _drawn_digits as drawn
import numpy as np
from PIL import Image

import headwater as hw

WEIGHT = 1.0


def main():
    model = hw.load("t2i-digits")
    model.pipeline.guidance_scale = 1.0  # words alone, no guidance by them
    search, others = drawn.prompts(20, seed=2, things=2), drawn.prompts(40, seed=3, things=2)
    found = hw.analyses.head_hunter(
        model,
        search,
        drawn.certainty,
        others,
        count=2,
        rounds=2,
        weight=WEIGHT,
        controls=4,
        seed=200,
        batch_size=40,
    )
    chosen = found.chosen.values.tolist()
    print(f"heads {', '.join(chosen)}; on the search prompts {float(found.found):.2f}")
    for treatment in found.treatment.values.tolist():
        mean, low, high = (float(found[n].sel(treatment=treatment)) for n in ("measure", "low", "high"))
        print(f"  {treatment:7} {mean:.2f} [{low:.2f}, {high:.2f}]")
    for against in found.against.values.tolist():
        gain, low, high = (float(found[n].sel(against=against)) for n in ("gain", "gain_low", "gain_high"))
        print(f"  chosen less {against}: {gain:.2f} [{low:.2f}, {high:.2f}]")
    edits = hw.recipes.soft_perturbation(chosen)
    view, some = model.part("self"), others[:8]
    rows = [
        view.generate(some, seed=7),
        view.generate(some, seed=7, against=hw.Branch(edits, weight=WEIGHT)),
        view.generate(some, seed=7, guidance_scale=2.0),
    ]
    sheet = np.concatenate([np.concatenate([np.pad(np.asarray(p), 1) for p in row], 1) for row in rows])
    picture = Image.fromarray(sheet).resize(
        (6 * sheet.shape[1], 6 * sheet.shape[0]), Image.Resampling.NEAREST
    )
    if len(sys.argv) > 1:
        picture.save(Path(sys.argv[1], "vision_head_hunter.png"))


if __name__ == "__main__":
    main()
