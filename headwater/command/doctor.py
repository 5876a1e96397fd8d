"""What this machine offers Headwater: builds, devices, memory, and attention backends that were run, not guessed.

Each backend computes one small grouped-query causal problem per device and is compared with float64 `reference`;
`choices.py` says which one `auto` takes for the problems that models and edits bring, and why.
"""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer

from headwater.command.columns import columns
from headwater.command.options import AsJson
from headwater.command.waiting import busy, counted
from headwater.lens.errors import HeadwaterError, first_line
from headwater.lens.files import check_target

PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "xarray", "pandas")
OPTIONAL = {
    "streamlit": "dashboard",
    "plotly": "dashboard",
    "numba": "fast",
    "triton": "triton",
    "transformer-lens": "transformer-lens",
    "diffusers": "diffusers",
}
TOLERANCE = (
    1e-4  # float32 and the half-precision tensor cores of a GPU stay far below; a wrong mask is far above
)


def doctor(
    models: Annotated[
        bool, typer.Option("--models", help="Measure every architecture against transformers' own attention.")
    ] = False,
    matrix: Annotated[
        bool, typer.Option("--matrix", help="Run every analysis on a small model of every architecture.")
    ] = False,
    write: Annotated[
        Path | None, typer.Option(help="With --models or --matrix: the page to put the table into.")
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(help="With --matrix: file of finished cells to go on from.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say what this machine offers: builds, devices, backends, memory, versions, network."""
    from headwater.command import output

    if write is not None:
        check_target(write, HeadwaterError)
    if matrix:
        _matrix(write, resume, as_json)
        return
    if models or write is not None:
        _architectures(write, as_json)
        return
    with busy("Trying the backends"):
        found = examine()
    typer.echo(output.as_json(found) if as_json else output.health(found))
    if not found["ok"]:
        raise typer.Exit(1)


def _architectures(write: Path | None, as_json: bool) -> None:
    from headwater.command import architectures, output
    from headwater.lens.loading.coverage import measure_all

    with busy("Measuring the architectures"):
        rows = list(measure_all())
    if write is not None:
        architectures.write(write, rows)
    lines = columns([list(architectures.HEADINGS), *map(architectures.cells, rows)])
    typer.echo(output.as_json(rows) if as_json else "\n".join(lines))
    for row in rows:
        for fault in row.faults:
            typer.echo(f"headwater: {row.title}: {fault}", err=True)
    if any(row.faults for row in rows):
        raise typer.Exit(1)


def _matrix(write: Path | None, resume: Path | None, as_json: bool) -> None:
    from headwater.command import matrix, matrix_page, output

    with counted("Running every analysis on every architecture") as tell:
        cells = matrix.measure(path=resume, tell=tell)
    if write is not None:
        matrix_page.write(write, cells)
    typer.echo(output.as_json(cells) if as_json else "\n".join(matrix_page.lines(cells)))
    failed = [cell for cell in cells if cell.state in ("wrong", "error")]
    for cell in failed:
        typer.echo(f"headwater: {cell.analysis} on {matrix_page.title(cell.row)}: {cell.line}", err=True)
    if failed:
        raise typer.Exit(1)


def examine() -> dict[str, Any]:
    """Facts about this installation as plain data; `ok` is False when a backend is wrong or no model is embedded."""
    import psutil
    import torch

    from headwater.command.choices import choices
    from headwater.lens.models.embedded import embedded
    from headwater.lens.records.free_memory import free_memory

    devices = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    backends = [trial for device in devices for trial in _trials(device)]
    models = sorted(embedded())
    return {
        "headwater": _version("headwater"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": {
            "version": torch.__version__,
            "build": f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU",
            "threads": torch.get_num_threads(),
        },
        "devices": [_device(device) for device in devices],
        "memory": {"total": psutil.virtual_memory().total, "available": free_memory()},
        "backends": backends,
        "choices": [choice for device in devices[:2] for choice in choices(device)],
        "packages": {name: _version(name) for name in PACKAGES},
        "optional": {name: {"version": _version(name), "extra": extra} for name, extra in OPTIONAL.items()},
        "embedded_models": models,
        "network": _network(),
        "ok": bool(models) and all(trial["ok"] for trial in backends if trial["ran"]),
    }


def _trials(device: str) -> list[dict[str, Any]]:
    """Every backend on one problem: batch 2, four heads over two key heads, 33 tokens (no multiple of a tile)."""
    import torch

    from headwater.kernels.attend import attend
    from headwater.kernels.backends.choose import NAMES
    from headwater.kernels.rules.rule import ScoreRule
    from headwater.kernels.tiles.mask import Mask

    seeded = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 33, 16, generator=seeded) for heads in (4, 2, 2))
    rule = ScoreRule(scale=0.25, mask=Mask(33, 33, right=0))
    expected, _ = attend(q.double(), k.double(), v.double(), rule, backend="reference")
    trials = []
    for name in NAMES:
        trial: dict[str, Any] = {"device": device, "backend": name, "ran": False, "ok": False}
        try:
            found, _ = attend(q.to(device), k.to(device), v.to(device), rule, backend=name)
        except (ValueError, RuntimeError, NotImplementedError) as error:
            trial["reason"] = first_line(error)
        else:
            apart = float((found.cpu().double() - expected).abs().max())
            trial |= {"ran": True, "largest_error": apart, "ok": apart < TOLERANCE}
        trials.append(trial)
    return trials


def _device(name: str) -> dict[str, Any]:
    import torch

    if name == "cpu":
        return {"name": "cpu", "model": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    card = torch.cuda.get_device_properties(name)
    return {"name": name, "model": card.name, "memory": card.total_memory}


def _network() -> dict[str, Any]:
    from huggingface_hub import constants

    return {
        "needed": "only to fetch a hub model that is not in the cache yet, and what `headwater models add` adds",
        "hub": "switched off by HF_HUB_OFFLINE" if constants.HF_HUB_OFFLINE else "allowed",
        "cache": constants.HF_HUB_CACHE,
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
