"""How the sink family learns: loss, sinks and largest scores by step of training, and what its rules need to learn.

`python benchmarks/sink_training.py [--runs softmax "sigmoid, bias -ln n"] [--work FOLDER]` trains small models of
data/models/sink-2l, each on one thread in minutes, and measures them at kept steps on texts that no step trains on.
Every run is written to results/sink_training.json at each of them, and one that the file holds to its last step is not
trained again (`--anew` begins anew); a run that is stopped goes on from its last checkpoint in FOLDER. `--quick` trains
two steps and writes nothing; `--draw FILE` trains nothing and draws how a kept run went, the first of `--runs` (softmax
unless told). No weights are kept in the project but those of "rows held", which ship as sink-2l-sigmoid: they come
again from the seed.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import xarray as xr
from cpu_report import earlier, head, write
from tqdm import tqdm

import headwater as hw
from headwater import analyses
from headwater.lens.models.embedded import FOLDER

sys.path.insert(0, str(FOLDER / "sink-2l"))
import language
import measure
import train

RESULTS = Path(__file__).parent / "results" / "sink_training.json"
MARKS = (0, 50, 100, 200, 300, 400, 500, 600, 800, 1000, 1250, 1500, 2000, 2500, 3000, 4000, 5000, 6000, 8000)
TEXTS, BATCH, STEPS = 64, 32, 2500
# what a run is: the rule and the shape, and what of its training differs from the family's
RUNS: dict[str, dict[str, Any]] = {
    "softmax": {"rule": {"normaliser": "softmax"}},
    "sigmoid, bias -ln n": {"rule": {"normaliser": {"name": "sigmoid", "bias": "row"}}},
    "sigmoid, bias -ln 64, rows held": {
        "rule": {"normaliser": {"name": "sigmoid", "bias": -math.log(train.LENGTH)}, "hold": 1.0},
        "steps": 4000,
    },
    "sigmoid, bias -ln 64": {
        "rule": {"normaliser": {"name": "sigmoid", "bias": -math.log(train.LENGTH)}},
        "steps": 4000,
    },
    "no positions, 4 layers": {
        "rule": {"normaliser": "softmax", "positions": "none", "layers": 4},
        "steps": 4000,
        "lr": 3e-3,
    },
}


@torch.no_grad()
def measured(model: Any, asked: dict[str, Any], texts: int = TEXTS) -> dict[str, Any]:
    """Figures of a model as it is: of held-out texts, of random words and the same again, and of each head."""
    found = measure.everything(model, texts, "emergence")
    text = found["text"]
    words = language.random_tokens(texts, 32, "twice")
    twice = torch.cat([words, words[:, 1:]], 1)
    guess = model(twice[:, :-1], use_cache=False).logits.argmax(-1)[
        :, 32:
    ]  # the copy from its second word on
    rows = language.texts(texts, train.LENGTH, "held-out emergence")
    weights = measure.maps(model, rows)
    told = {
        "loss": found["loss"],
        "after_triggers_right": found["after_triggers_right"],
        "copied_right": (guess == twice[:, 33:]).double().mean().item(),
        "sink_rate": text["sink_rate"],
        "sink_rate_of_shares": text["sink_rate_of_shares"],
        "first_share": measure.shares(weights, True)[..., 0].mean(1).tolist(),
        "row_mass": text["row_mass"],
        "heavy_rows": (weights.sum(-1) > 1.001).double().mean().item(),
    }
    if asked["rule"] == {"normaliser": "softmax"}:
        record = hw.load(copy.deepcopy(model), tokenizer=language.tokenizer()).record(rows)
        told["max_logit"] = analyses.max_logits(record).max_logit.values.tolist()
    return told


def trained(
    name: str, asked: dict[str, Any], work: Path, seed: int = 0, keep: Callable[[list], None] | None = None
) -> tuple[Any, list[dict[str, Any]]]:
    """The trained model, and its figures at the marks up to its last step; `keep` is given those at every mark."""
    steps, lr = asked.get("steps", STEPS), asked.get("lr", 5e-3)
    torch.manual_seed(seed)
    model = train.build(asked["rule"])
    optimiser, told, done = train.optimiser_of(model), [], 0
    file = work / f"{name.replace(' ', '-')}-{seed}.pt"
    if file.exists():
        state = torch.load(file, weights_only=True)
        model.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        told, done = state["told"], state["step"]
        if keep:
            keep(told)
    for step in tqdm(range(done, steps + 1), initial=done, total=steps, mininterval=5, desc=name):
        if (step in MARKS or step == steps) and (not told or told[-1]["step"] < step):
            told.append({"step": step} | measured(model, asked))
            state = {"model": model.state_dict(), "optimiser": optimiser.state_dict()}
            train.save(file, state | {"told": told, "step": step})
            if keep:
                keep(told)
        if step < steps:
            rows = language.texts(BATCH, train.LENGTH + 1, f"train {seed} {step}")
            train.learn(
                model, optimiser, rows, train.learning_rate(step, steps, lr), asked["rule"].get("hold", 0.0)
            )
    return model, told


def drawn(by_step: list[dict[str, Any]]) -> xr.DataArray:
    """How the sink of a run comes: shares [statistic, step]."""
    shares = {
        "copy right": [row["copied_right"] for row in by_step],
        "largest head": [max(map(max, row["first_share"])) for row in by_step],
        "sink rate": [row["sink_rate_of_shares"] for row in by_step],
    }
    coords = {"statistic": list(shares), "step": [row["step"] for row in by_step]}
    told = xr.DataArray(list(shares.values()), coords, ("statistic", "step"), name="share")
    return told.assign_attrs(unit="share", question="When does the sink come?")


def main() -> None:
    given = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    given.add_argument("--runs", nargs="+", default=list(RUNS), choices=list(RUNS))
    given.add_argument("--work", type=Path, help="folder of checkpoints; none: a run begins anew")
    given.add_argument("--draw", type=Path, metavar="FILE", help="write the figure of a kept run there")
    given.add_argument("--anew", action="store_true")
    given.add_argument("--quick", action="store_true")
    asked = given.parse_args()
    torch.set_num_threads(1)
    if asked.draw:
        kept = json.loads(RESULTS.read_text(encoding="utf-8"))["runs"]
        by_step = kept[asked.runs[0]]["by_step"]
        hw.figure(drawn(by_step)).write_image(asked.draw)
        return
    with tempfile.TemporaryDirectory() as folder:
        work = asked.work or Path(folder)
        if asked.quick:
            print(trained("quick", RUNS["softmax"] | {"steps": 2}, Path(folder))[1])
            return
        report = head("Training of the sink family: figures by step.", 1) | {"texts": TEXTS, "seed": 0}
        kept = earlier(RESULTS, report, asked.anew)
        runs: dict[str, Any] = kept.get("runs", {})
        report["runs"] = runs
        for name in asked.runs:
            kept_steps = [row["step"] for row in runs.get(name, {}).get("by_step", [])]
            if RUNS[name].get("steps", STEPS) in kept_steps:
                continue

            def keep(told: list, name: str = name) -> None:
                runs[name] = {"settings": RUNS[name], "by_step": told}
                write(report, RESULTS)

            _, told = trained(name, RUNS[name], work, keep=keep)
            print(
                name,
                {each: told[-1][each] for each in ("loss", "copied_right", "sink_rate_of_shares")},
                flush=True,
            )


if __name__ == "__main__":
    main()
