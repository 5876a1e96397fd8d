"""`Unit`, the smallest piece of a sweep: one analysis of one prompt or pair, under one list of edits, with one seed."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from headwater.lens.files import digest_of


@dataclass(frozen=True)
class Unit:
    """Plain data: it goes to a worker as JSON. `at` is the place of the prompt, text or pair in its list."""

    number: int
    analysis: str
    settings: dict[str, Any]
    kind: str  # "prompt", "text" (of a corpus), "pair", or "" for an analysis of the model alone
    at: int
    given: dict[str, Any]  # the prompt or the pair; of a text its file tells where it stands
    layers: list[int] | None
    edits: str
    seed: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def key(self, run: str, given: str, edits: str) -> str:
        """64 hexadecimal digits that differ where anything differs that decides the numbers, and between any two units.

        The number is part of it because the file of a unit holds it: two units that are alike have a file each. `run`
        is the digest of what all units share (weights, records that edits name, precision, versions, processor),
        `given` that of the prompt as token ids, `edits` that of the edits.
        """
        own = {
            "number": self.number,
            "analysis": self.analysis,
            "settings": self.settings,
            "layers": self.layers,
            "seed": self.seed,
        }
        return digest_of({"run": run, "given": given, "edits": edits, **own}).removeprefix("sha256:")
