"""Forward passes of many threads, each under edits of its own that change from pass to pass.

`python tests/support/many_forwards.py COUNT` prints how many passes there were and how many gave other numbers than the
same pass alone.
"""

from __future__ import annotations

import contextlib
import json
import random
import sys
import threading
from typing import Any

import tiny_models
import torch

import headwater as hw

THREADS = 8
GROUPS = {"last": [11], "first": [0]}


def cases(model: hw.HookedModel, ids: torch.Tensor) -> list[tuple[list[Any], torch.Tensor]]:
    """Edits, and the logits that they give when nobody else runs."""
    several: list[list[Any]] = [
        [], [hw.ScaleHeads({"1.1": 0.0})], [hw.Redistribute([0], 0.0)], [hw.TowardIdentity(0.9)],
        [hw.Knockout(-1, [0])],
        [hw.Temperature(2.0, heads="0.1")], [hw.AblateHeads(["1.0"])], [hw.EditResidual(1, "add", [0.3] * 32)],
        [hw.Knockout("last", ["first"])], [hw.StreamingWindow(1, 2), hw.ScaleHeads({"0.0": 0.5})],
        [hw.OffsetHeads({"2.2": [1.0] * 8})], [hw.InjectPattern("previous", 0.7)],
    ]  # fmt: skip
    found = []
    for edits in several:
        with model.edit(*edits, groups=GROUPS):
            found.append((edits, model(ids)))
    return found


def forwards(count: int, threads: int = THREADS) -> dict[str, int]:
    """Run `count` passes in so many threads, and count those that another's edits reached."""
    model = hw.load(tiny_models.tiny("llama"))
    ids, _ = tiny_models.batch(1, (12,))
    every = cases(model, ids)
    wrong: list[int] = []
    done: list[int] = []
    start = threading.Barrier(threads)

    def visitor(number: int) -> None:
        chance = random.Random(number)
        start.wait()
        for _ in range(number, count, threads):
            which = chance.randrange(len(every))
            edits, expected = every[which]
            with contextlib.ExitStack() as blocks:
                for edit in edits:
                    blocks.enter_context(model.edit(edit, groups=GROUPS))
                if not model(ids).equal(expected):
                    wrong.append(which)
            done.append(which)

    running = [threading.Thread(target=visitor, args=(n,)) for n in range(threads)]
    for each in running:
        each.start()
    for each in running:
        each.join()
    assert model(ids).equal(every[0][1]), "something is left on the model"
    return {"forwards": len(done), "threads": threads, "edits": len(every), "contaminated": len(wrong)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(forwards(int(sys.argv[1]))))
