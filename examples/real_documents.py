"""Does SmolLM2's answer depend on the order of three documents, and does order-free reading (PINE) mend that?"""

from itertools import chain, pairwise, permutations

import numpy as np
import torch
import xarray as xr
from _kept import QUICK, interval, keep

import headwater as hw

SEED, N = 0, 1 if QUICK else 12
CITIES = ["Paris", "London", "Berlin", "Rome", "Madrid", "Vienna", "Tokyo", "Moscow", "Chicago", "Boston"]
JOBS = ["baker", "lawyer", "teacher", "farmer", "painter", "singer", "doctor", "sailor"]
NAMES = ["Maria", "John", "Anna", "Peter", "Laura", "David", "Sarah", "James"]
ORDERS = list(permutations(range(3)))
rng, model = np.random.default_rng(SEED), hw.load("smollm2-135m")


def tokens(text):
    return model.tokenizer(text)["input_ids"]


ways = {
    "in order": lambda spans: [],
    "order-free": lambda spans: hw.recipes.order_free(model, spans),
    "apart": lambda spans: [hw.Knockout(slice(*a), slice(*b)) for a in spans for b in spans if a != b],
}  # "apart" is the control: no note sees another, but each keeps its place
right, chance, top = (np.zeros((N, len(ways), len(ORDERS))) for _ in range(3))
for n in range(N):
    names, cities, jobs = (rng.choice(words, 3, replace=False) for words in (NAMES, CITIES, JOBS))
    facts = zip(jobs, names, cities, strict=True)
    notes = [tokens(f"The {job} is called {name} and lives in {city}.\n") for job, name, city in facts]
    question = tokens(f"Question: Where does the {jobs[0]} live?\nAnswer: The {jobs[0]} lives in")
    answer = tokens(f" {cities[0]}")[0]
    for at, order in enumerate(ORDERS):
        parts = [tokens("Read these notes.\n"), *(notes[place] for place in order), question]
        spans = list(pairwise(np.cumsum([len(part) for part in parts]).tolist()))[:3]
        for way, edit in enumerate(ways.values()):
            with model.edit(*edit(spans)):
                chances = model(torch.tensor([list(chain(*parts))]))[0, -1].softmax(-1)
            top[n, way, at], chance[n, way, at] = chances.argmax(), chances[answer]
            right[n, way, at] = chances.argmax() == answer
first = [np.array([order.index(0) == place for order in ORDERS]) for place in range(3)]
by_place = np.stack([right[..., at].mean(-1) for at in first], -1)
told = {"questions": N, "orders": len(ORDERS), "seed": SEED}
for way, name in enumerate(ways):
    changes = [len(set(row)) > 1 for row in top[:, way]]
    spread = np.ptp(chance[:, way], -1)
    found = {"right": right[:, way].mean(-1), "answer changes": changes, "range of its chance": spread}
    told[name] = {what: interval(values, SEED) for what, values in found.items()}
    told[name]["right, its note first to last"] = by_place[:, way].mean(0).tolist()
    print(f"{name}: {told[name]}")
coords = {"way": list(ways), "place of its note": ["first", "second", "third"]}
shown = xr.DataArray(
    by_place.mean(0), coords, name="right answers", attrs={"unit": "fraction of questions and orders"}
)
keep(told, hw.figure(shown), model)
