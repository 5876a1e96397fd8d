"""Files of sweeps as strangers may give them: the sweep, and the three kinds of file in the folder of a run."""

from __future__ import annotations

import contextlib
import json
import random
import shutil
from pathlib import Path
from unittest import mock

import sweep_engines
from fuzzing import Target, bytes_changed, data_changed, header_changed, json_changed

import headwater as hw
from headwater.analyses._sweeps import run_sweep
from headwater.analyses._sweeps.kept import unpack
from headwater.analyses._sweeps.sweep_run import LEDGER, MANIFEST, Manifest

ANALYSES = [{"analysis": "rollout"}, {"analysis": "sink_rate", "each": {"threshold": [0.3, 0.5]}}]


def sweep(folder: Path) -> Target:
    """Sweep files; the first and the last unit are asked for."""
    whole = [
        sweep_engines.asked(edits=sweep_engines.OFF, layers=[[0, 1], [2]], analyses=ANALYSES),
        sweep_engines.asked(seeds=[0, 1], analyses=[{"analysis": "agreement"}]),
        sweep_engines.asked(prompts=[], corpus={"path": "a/b.txt", "unit": "paragraph", "length": 9}),
    ]

    def read(path: Path) -> None:
        found = hw.Sweep.open(path)
        units = found.units_of(3 if found.corpus else None)
        units[0], units[len(units) - 1]

    return Target(".json", [each.model_dump_json().encode() for each in whole], json_changed, read)


def ran(folder: Path) -> hw.SweepRun:
    """A run of four units."""
    with mock.patch.object(run_sweep, "_engine", lambda kind, setup, *_: sweep_engines.Here(setup, {})):
        return hw.run_sweep(sweep_engines.asked(), folder / "a.run", base=folder, workers=1)


def in_run(folder: Path, file: str) -> Target:
    """The manifest or the ledger of a run changed; its state and results are asked for."""
    home = ran(folder).path

    def read(path: Path) -> None:
        shutil.copy(path, home / file)
        found = hw.SweepRun(home)
        found.counts(), found.table(), found.digest(), list(found.damaged()), len(found.units)
        found.result(0)

    change = manifest_changed if file == MANIFEST else bytes_changed
    return Target(Path(file).suffix, [(home / file).read_bytes()], change, read)


def manifest(folder: Path) -> Target:
    return in_run(folder, MANIFEST)


def ledger(folder: Path) -> Target:
    return in_run(folder, LEDGER)


def manifest_changed(chance: random.Random, content: bytes) -> bytes:
    """JSON changed, or by somebody who knows the format, with a digest that is right."""
    if chance.random() < 0.5:
        return json_changed(chance, content)
    told = data_changed(chance, json.loads(content))
    with contextlib.suppress(TypeError, KeyError, ValueError):  # what is left may have no digest
        told["digest"] = Manifest(told["sweep"], told["facts"], "").digest
    return json.dumps(told).encode("utf-8", "surrogatepass")


def unit(folder: Path) -> Target:
    """The file of one unit."""
    found = ran(folder)
    whole = [path.read_bytes() for path in sorted(found.path.glob("units/*/*.safetensors"))]
    return Target(".safetensors", whole, header_changed, lambda path: unpack(path.read_bytes(), path.name))
