"""What an analysis says about itself, and the attributes this gives to each of its results.

Every analysis file holds one `ABOUT`; the catalogue shows it, and `ABOUT.attrs(provenance, ...)` writes it on
the result together with where the numbers come from. Values that netCDF cannot hold are written as JSON text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Inputs = Literal["record", "model", "model+examples", "model+pairs", "circuits"]


@dataclass(frozen=True)
class About:
    """Question, unit, source, cost and limits of one analysis; `keep` is what a record made for it holds."""

    question: str
    unit: str
    paper: str
    inputs: Inputs
    cost: str
    not_for: str
    keep: tuple[str, ...] = ("qk",)

    def attrs(self, provenance: Mapping[str, Any], **settings: Any) -> dict[str, Any]:
        """Attributes of a result: what was asked, of which model under which edits, with which settings."""
        told = {"question": self.question, "unit": self.unit, "paper": self.paper, "not_for": self.not_for}
        return {key: _storable(value) for key, value in {**told, **provenance, **settings}.items()}


def _storable(value: Any) -> Any:
    if isinstance(value, bool):
        return int(value)
    if value is None:
        return ""
    if isinstance(value, str):
        return str(value)  # torch's version is text of a kind of its own, which no graph file takes
    if isinstance(value, int | float):
        return value
    return json.dumps(value, default=str)
