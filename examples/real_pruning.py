"""How many of SmolLM2's 270 heads can go before it reads real text worse, and does the order matter?"""

import xarray as xr
from _kept import QUICK, interval, keep, passages

import headwater as hw
from headwater import analyses

SEED = 0
N, LENGTH, STEP, CONTROLS = (2, 16, 0.5, 1) if QUICK else (8, 128, 0.1, 3)
model = hw.load("smollm2-135m")
ranked_on, judged_on = passages(model, 2 * N, LENGTH, SEED).split(N)

pruned = analyses.prune_heads(
    model, ranked_on, step=STEP, unit="head", controls=CONTROLS, batch_size=N, seed=SEED
)
heads = pruned.order.values.tolist()
whole = model.loss(judged_on).double().numpy()
told = {"heads": len(heads), "passages": N, "tokens": LENGTH, "seed": SEED, "random orders": CONTROLS}
told["loss of the whole model"] = interval(whole, SEED)
print(f"loss of the whole model: {whole.mean():.2f} nats per token ({N} passages that ranked no head)")
others = []
for n, fraction in enumerate(pruned.fraction.values):
    gone = heads[: len(heads) - int(pruned.heads_left[n])]
    with model.edit(hw.ScaleHeads(dict.fromkeys(gone, 0.0))):
        more = interval(model.loss(judged_on).double().numpy() - whole, SEED)
    band = (pruned.random[:, n] - pruned.random[:, 0]).values.round(4).tolist()
    own = round(float(pruned.measure[n] - pruned.measure[0]), 4)
    told[f"without {fraction:.0%}"] = {
        "more": more,
        "on the passages that ranked": own,
        "random orders": band,
    }
    print(
        f"  without {fraction:4.0%}: {more[0]:+.2f} ({more[1]:+.2f} to {more[2]:+.2f}); random order {band}"
    )
    others.append(more[0])
curves = {
    "least important first": others,
    **{f"random order {n}": x - x[0] for n, x in enumerate(pruned.random.values)},
}
shown = xr.DataArray(
    list(curves.values()), {"order": list(curves), "fraction": pruned.fraction.values},
    name="loss beyond the whole model's", attrs={"unit": "nats per token"},
)  # fmt: skip
keep(told, hw.figure(shown), model)
