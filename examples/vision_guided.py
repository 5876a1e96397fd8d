"""Words held to regions of a drawing of `t2i-digits` by losses over its attention; `vit-digits` is the judge."""

import contextlib
import sys

import _drawn_digits as drawn
import numpy as np
from _region_losses import SCATTERED, SIDES, WORDS, bounded, overlap, refocus
from PIL import Image

import headwater as hw
from headwater.data.pictures import drawings


def main():
    model, prompts = hw.load("t2i-digits"), [p.split() for p in drawn.prompts(60, seed=12, things=2)]
    texts = [f"{a} {b} and {c} {d}" for a, b, _, _, c, d, _ in prompts if b != d][:40]  # without the places
    told = [drawings.things_of(text.replace(" and", " left and") + " right") for text in texts]
    masks, rows = hw.recipes.bounded_attention, []
    cases = {
        "plain, with the loss of A-STAR": (overlap, 0, None),
        "plain, of refocus": (refocus(SIDES), 0, None),
    }
    cases |= {"plain, of bounded": (bounded(SIDES), 0, None), "A-STAR": (overlap, 20, None)}
    for name, at in (("", SIDES), (", sides exchanged", SIDES.flip(0)), (", scattered patches", SCATTERED)):
        cases[f"refocus{name}"] = refocus(at), 1, None
        cases[f"bounded{name}"] = bounded(at), 20, masks(at, WORDS)
    cases["bounded, masks alone"] = None, 0, masks(SIDES, WORDS)
    for name, (loss, rate, edits) in cases.items():
        with contextlib.ExitStack() as stack:
            run = stack.enter_context(model.guiding(loss, rate, steps=range(4))) if loss else None
            for part, listed in (edits or {}).items():
                stack.enter_context(model.part(part).edit(*listed))
            rows.append(np.stack([np.asarray(p, np.float32) / 255 for p in model.generate(texts, seed=300)]))
        right = (
            drawings.right(rows[-1], told, lambda x: drawn.probabilities(x).argmax(-1))["digit"]
            .reshape(-1, 2)
            .mean(1)
        )
        low, high = np.quantile(np.random.default_rng(0).choice(right, (2000, 40)).mean(1), [0.025, 0.975])
        fell = [f"{float(run.losses[n][0].mean()):.2f}" for n in (0, 3)] if run else []
        print(f"{name}: {right.mean():.2f} [{low:.2f}, {high:.2f}]", "loss", *fell if fell else ["none"])
    if len(sys.argv) > 1:
        sheet = np.concatenate(
            [np.concatenate([np.pad(p, 1, constant_values=0.3) for p in row[:8]], 1) for row in rows]
        )
        picture = Image.fromarray((255 * sheet).astype(np.uint8))
        picture.resize((5 * sheet.shape[1], 5 * sheet.shape[0]), 0).save(f"{sys.argv[1]}/vision_guided.png")


if __name__ == "__main__":
    main()
