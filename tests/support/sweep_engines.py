"""An engine in this process whose workers fail when a test says so, and a small sweep."""

import functools
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import torch

import headwater as hw
from headwater.analyses._sweeps.worker import Setup, Worker

TEXTS = [f"Mary gave John a drink {'and Mary ' * n}".strip() for n in range(4)]
OFF = {"none": [], "off": [hw.ScaleHeads({"1.1": 0.0}).to_dict()]}


def asked(**more: Any) -> hw.Sweep:
    return hw.Sweep(**{"model": "tasks-4l", "prompts": TEXTS, "analyses": [{"analysis": "rollout"}]} | more)


@functools.cache
def _opened(name: str, dtype: str) -> hw.HookedModel:
    return hw.load(name, dtype=getattr(torch, dtype))


def open_once(monkeypatch: Any) -> None:
    """Drivers and workers of this process share a model."""
    for module in ("run_sweep", "worker"):
        monkeypatch.setattr(
            f"headwater.analyses._sweeps.{module}.open_model",
            lambda sweep, base, own: _opened(sweep.model, sweep.dtype),
        )


class Here:
    """Workers without processes. `faults` are answers that come first for a unit, by its number."""

    def __init__(self, setup: Setup, faults: Mapping[int, Sequence[Mapping[str, Any]]]) -> None:
        self.worker = Worker(setup)
        self.faults = {number: list(answers) for number, answers in faults.items()}
        self.answers: deque[tuple[int, dict[str, Any]]] = deque()
        self.opened = 0
        self.tasks: list[int] = []
        self.ended: set[int] = set()

    def open(self) -> int:
        self.opened += 1
        self.answers.append((self.opened, {"kind": "opened", "facts": self.worker.facts}))
        return self.opened

    def give(self, worker: int, tasks: Sequence[Mapping[str, Any]]) -> None:
        for task in tasks:
            if worker in self.ended:
                return
            number = task["number"]
            self.tasks.append(number)
            faults = self.faults.get(number)
            answer = dict(faults.pop(0)) if faults else self.worker.answer(number, task["key"])
            answer["number"] = number
            self.answers.append((worker, answer))
            if answer["kind"] == "died":
                self.ended.add(worker)

    def wait(self, seconds: float) -> list[tuple[int, dict[str, Any]]]:
        return [self.answers.popleft()] if self.answers else []

    def retire(self, worker: int) -> None:
        self.ended.add(worker)

    def close(self) -> None:
        pass
