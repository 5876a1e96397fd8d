"""The small trained models that ship with Headwater, each with its weights, training script, metrics and licence."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parents[2] / "data" / "models"


@cache
def embedded() -> dict[str, dict[str, Any]]:
    """{name: {"path", "description", "metrics"}} of every embedded model."""
    found = {}
    for folder in sorted(FOLDER.iterdir()) if FOLDER.is_dir() else []:
        if not (folder / "config.json").is_file() or not (folder / "model.safetensors").is_file():
            continue
        metrics = folder / "metrics.json"
        readme = folder / "README.md"
        paragraphs = readme.read_text(encoding="utf-8").split("\n\n") if readme.is_file() else []
        opening = next((each for each in paragraphs if each.strip() and not each.startswith("#")), "")
        text = re.split(r"(?<=\.) ", " ".join(opening.split()))[0]  # its first sentence
        found[folder.name] = {
            "path": folder,
            "description": text,
            "metrics": json.loads(metrics.read_text(encoding="utf-8")) if metrics.is_file() else {},
        }
    return found
