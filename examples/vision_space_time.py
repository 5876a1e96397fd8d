"""Which answers of a small video model need other frames: the digit, or the way it moves?"""

import random

import _kept
import xarray as xr

import headwater as hw
from headwater import analyses
from headwater.data.pictures import films

COUNT, SEED = 40 if _kept.QUICK else 200, 100
model, rng = hw.load("video-digits"), random.Random(f"space and time {SEED}")
drawn = [films.film(rng, held_out=True) for _ in range(COUNT)]
examples = [hw.Example(image=film.frames()) for film in drawn]
MOVES = len(films.MOVES)
QUESTIONS = {
    "digit": lambda logits: logits.view(-1, 10, MOVES).logsumexp(2),
    "movement": lambda logits: logits.view(-1, 10, MOVES).logsumexp(1),
}

right = model(model.to_tokens(examples)).argmax(-1).numpy() == [film.label for film in drawn]
told = {"films": COUNT, "digit and movement right": _kept.interval(right)}
record = model.record(examples[:100])
found = analyses.space_time(record, seed=SEED)
chance = {kind: round(float(found.chance.sel(kind=kind)), 3) for kind in ("spatial", "temporal", "elsewhere")}
told["share under uniform attention"] = chance
for layer in record.layers:
    for kind in ("spatial", "temporal"):
        told[f"layer {layer}, {kind}, by head"] = (
            found.share.sel(kind=kind, layer=layer).round(3).values.tolist()
        )
kept = {}
for question, read in QUESTIONS.items():
    kept[question] = analyses.frame_knockout(model, examples, read=read, seed=SEED)
    for name in kept[question].treatment.values:
        at = kept[question].sel(treatment=name)
        told[f"{question} kept, {name} hidden"] = [round(float(at[x]), 4) for x in ("kept", "low", "high")]
told["pairs hidden"] = {
    str(t): round(float(kept["digit"].hidden.sel(treatment=t)), 3) for t in kept["digit"].treatment.values
}
_kept.show(told)
bars = xr.concat(list(kept.values()), xr.DataArray(list(kept), dims="question")).drop_vars(
    ["per_example", "divergence"]
)
bars.attrs |= {"unit": "share of films whose answer stays"}
figure = hw.figure(bars, variable="kept", title="What does a video model need other frames for?")
_kept.keep(told | {"seed": SEED}, figure, model)
