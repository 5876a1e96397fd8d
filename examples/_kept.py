"""What the scripts on real models share: real text, intervals, and a folder in which their findings are kept.

`python examples/real_sinks.py docs/real` writes the numbers and the figure of that script into `docs/real`;
`--quick` in place of a folder, or behind it, makes the samples so small that the script only shows that it runs.
"""

import json
import platform
import sys
from datetime import date
from pathlib import Path
from pydoc_data.topics import topics  # the reference of Python, as English text

import numpy as np
import torch
import transformers

import headwater as hw

QUICK = "--quick" in sys.argv


def passages(model, count, length, seed=0):
    """`count` random passages of the reference of Python, int64 [passage, length], that do not overlap."""
    text = "\n\n".join(topics[name] for name in sorted(topics))
    whole = torch.tensor(model.tokenizer(text, verbose=False)["input_ids"]).unfold(0, length, length)
    return whole[torch.randperm(len(whole), generator=torch.Generator().manual_seed(seed))[:count]]


def interval(values, seed=0):
    """Mean over axis 0, and the bounds of 95 % of the means of 1,000 resamples: three numbers for each column.

    `seed`: a number, or a generator that goes on where it stood.
    """
    values = np.asarray(values, dtype=float)
    means = values[np.random.default_rng(seed).integers(len(values), size=(1000, len(values)))].mean(1)
    return np.stack([values.mean(0), *np.quantile(means, [0.025, 0.975], 0)]).round(4).tolist()


def show(told):
    for what, value in told.items():
        print(f"{what}: {value}")


def earlier(told):
    """What the folder that the command line names holds of this script's findings, from a run that was stopped.

    Empty without one, and where its settings `told` or versions were others. Models of a name have one revision.
    """
    file = _file()
    if file is None or not file.with_suffix(".json").exists():
        return {}
    found = json.loads(file.with_suffix(".json").read_text("utf-8"))
    now = told | _made_by()
    return found if all(found.get(what) == value for what, value in now.items()) else {}


def keep(told, figure, model):
    """Write NAME.json and NAME.svg of the script NAME.py into the folder that the command line names, if it does.

    Without a figure the numbers alone, as of a script that is not done yet.
    """
    file = _file()
    if file is None:
        return
    run = {
        "model": model.name,
        "revision": model.revision,
        "machine": platform.machine(),
        "date": str(date.today()),
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    file.with_suffix(".json").write_text(
        json.dumps(told | run | _made_by(), indent=1) + "\n", encoding="utf-8"
    )
    if figure is not None:
        figure.write_image(file.with_suffix(".svg"))


def _made_by():
    return {
        "headwater": hw.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _file():
    """The file of this script in that folder, without its ending."""
    folders = [argument for argument in sys.argv[1:] if argument != "--quick"]
    return Path(folders[0]) / Path(sys.argv[0]).stem if folders else None
