"""`Steps`: what was recorded of a sampling run, a record for every call of the denoiser."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import xarray as xr

from headwater.lens.errors import RecordError, nearest
from headwater.lens.files import as_path
from headwater.lens.records.record import Record
from headwater.lens.running.denoising import Now

ABOUT = "denoising"  # in the provenance of each record


class Steps:
    """The records of a sampling run, in its order; `len(steps)` counts its steps.

    `record(step)` is the `Record` of a step: statistics, and maps of the steps that were chosen. Its rows are those of
    the denoiser's batch, branch after branch. `statistic(name)` joins all steps.
    """

    def __init__(self) -> None:
        self.calls: list[tuple[Now, Record]] = []

    def __len__(self) -> int:
        return len({now.step for now, _ in self.calls})

    def __repr__(self) -> str:
        return f"Steps({len(self)} steps, branches {', '.join(self.branches) or 'none'})"

    @property
    def timesteps(self) -> list[float]:
        """The time of each step, as the denoiser was told."""
        return list({now.step: now.timestep for now, _ in self.calls}.values())

    @property
    def branches(self) -> tuple[str, ...]:
        """The names of the branches, in the order of the first step."""
        return tuple(dict.fromkeys(name for now, _ in self.calls for name in now.branches))

    def add(self, now: Now, record: Record) -> None:
        """Take the record of one more call."""
        about = {
            "step": now.step,
            "timestep": now.timestep,
            "branches": list(now.branches),
            "known": list(now.known),
        }
        record.provenance[ABOUT] = about
        self.calls.append((now, record))

    def record(self, step: int, branch: str | None = None) -> Record:
        """The record of a step; `branch` chooses among calls where branches ran one by one. RecordError for none."""
        found = [each for now, each in self.calls if now.step == step and branch in (None, *now.branches)]
        if not found:
            if self.calls and branch is not None and branch not in self.branches:
                raise RecordError(f"no branch {branch!r} was recorded: {nearest(branch, self.branches)}")
            raise RecordError(f"no step {step!r} was recorded; there are {len(self)}, from 0 on")
        return found[0]

    def statistic(self, name: str, part: str | None = None) -> xr.DataArray:
        """A statistic of all steps, [step, branch, batch, layer, head, query], or with key for query; `part` as in
        `Record.part`, None for the part of the records. The coordinate `timestep` is on the step."""
        if not self.calls:
            raise RecordError(
                "no call of the denoiser was recorded; run it inside `with model.record_steps()`"
            )
        by_step: dict[int, dict[str, xr.DataArray]] = {}
        for now, record in self.calls:
            own = record.provenance.get("part")
            found = (record if part in (None, own) else record.part(str(part))).statistic(name)
            for branch in now.branches:
                rows = now.rows(branch, found.sizes["batch"])
                by_step.setdefault(now.step, {})[branch] = found.isel(batch=list(rows))
        steps = []
        for number, branches in by_step.items():
            if set(branches) != set(self.branches) or len({each.shape for each in branches.values()}) > 1:
                raise RecordError(
                    f"step {number} has other branches or sizes than the first; take record({number})"
                )
            steps.append(
                xr.concat(
                    [branches[name] for name in self.branches], "branch", coords="different", compat="equals"
                )
            )
        if len({each.shape for each in steps}) > 1:
            raise RecordError("the sizes of the picture differ between steps; take record(step)")
        joined = xr.concat(steps, "step", coords="minimal", compat="override", combine_attrs="override")
        joined = joined.assign_coords(
            step=list(by_step), branch=list(self.branches), timestep=("step", self.timesteps)
        )
        joined.attrs.pop(ABOUT, None)
        return joined

    def save(self, folder: str | Path) -> Path:
        """Write one file for each call into a folder, which is made; RecordError where it holds other files."""
        place = as_path(folder, RecordError)
        place.mkdir(parents=True, exist_ok=True)
        if any(place.iterdir()):
            raise RecordError(f"{place} is not empty; give a new folder")
        for n, (_, record) in enumerate(self.calls):
            record.save(place / f"call-{n:05d}.safetensors")
        return place

    @staticmethod
    def open(folder: str | Path) -> Steps:
        """The steps that `save` wrote; RecordError where a file is none of them."""
        found = Steps()
        for path in sorted(_files(as_path(folder, RecordError))):
            record = Record.open(path)
            told = record.provenance.get(ABOUT)
            told = json.loads(told) if isinstance(told, str) else told or {}
            try:
                now = Now(
                    int(told["step"]), float(told["timestep"]), tuple(map(str, told["branches"])),
                    tuple(map(str, told["known"])),
                )  # fmt: skip
            except (KeyError, TypeError, ValueError):
                raise RecordError(f"{path} is not the record of a step of a sampling run") from None
            found.calls.append((now, record))
        return found


def _files(folder: Path) -> Iterator[Path]:
    if not folder.is_dir() or not (files := list(folder.glob("call-*.safetensors"))):
        raise RecordError(f"{folder} holds no steps; give a folder that Steps.save wrote")
    yield from files
