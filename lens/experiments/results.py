"""Results of an experiment: what was asked, of which weights, and what came, with a digest over all of it."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headwater.lens.errors import ExperimentError
from headwater.lens.files import digest_of, parse_json, read_text, write_text

if TYPE_CHECKING:
    from headwater.lens.model import HookedModel

MOST_BYTES = 2**32  # a journal of the largest size, its numbers one on a line


@dataclass(frozen=True)
class Results:
    """What came: `results` holds {"before": …, "after": …} of each prompt, by measure; plain data."""

    inputs: str
    model: str
    revision: str
    results: list[dict[str, Any]]
    versions: dict[str, str]
    machine: str

    @classmethod
    def of(cls, inputs: str, model: HookedModel, results: list[dict[str, Any]]) -> Results:
        """Results of the experiment whose `inputs_digest` is given."""
        # what JSON makes of the numbers is what is compared later
        plain = json.loads(json.dumps(results, allow_nan=False))
        return cls(inputs, model.name, model.revision, plain, versions_now(), platform.machine())

    @property
    def digest(self) -> str:
        """sha256 over what was asked, of which weights, and what came."""
        return digest_of({"inputs": self.inputs, "revision": self.revision, "results": self.results})

    def to_json(self) -> str:
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return json.dumps({**fields, "digest": self.digest}, indent=1, allow_nan=False) + "\n"

    @classmethod
    def open(cls, path: Path) -> Results:
        """Read what was written; ExperimentError where it was changed since, or is none."""
        data = parse_json(read_text(path, MOST_BYTES, ExperimentError), str(path), ExperimentError)
        try:
            found = cls(**{name: data[name] for name in cls.__dataclass_fields__})
            same = data["digest"] == found.digest
            well_formed = found.results and all(map(is_result, found.results))
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise ExperimentError(
                f"{path} holds no results of an experiment ({type(error).__name__})"
            ) from None
        if not same:
            raise ExperimentError(
                f"{path} was changed after it was written: its digest is another; delete it"
            )
        if not well_formed:
            raise ExperimentError(f"{path} holds no results of an experiment; delete it")
        return found

    def save(self, path: Path) -> Path:
        """Write them, whole or not at all."""
        text = self.to_json()
        if len(text) > MOST_BYTES:
            raise ExperimentError(
                f"{path} would be larger than {MOST_BYTES // 2**20} MiB; divide the experiment, or leave out maps"
            )
        return write_text(path, text, ExperimentError)


def versions_now() -> dict[str, str]:
    """The versions of what computes the numbers."""
    return {name: version(name) for name in ("headwater", "torch", "transformers")}


def is_result(content: Any) -> bool:
    """Whether it has the form of one prompt's result."""
    return (
        isinstance(content, dict)
        and all(isinstance(content.get(when, {}), dict) for when in ("before", "after"))
        and "before" in content
    )


def numbers_of(content: Any, name: str = "results") -> Iterator[tuple[str, Any]]:
    """Every single value with where it stands, such as `results.0.after.loss`."""
    if isinstance(content, dict):
        for key, value in content.items():
            yield from numbers_of(value, f"{name}.{key}")
    elif isinstance(content, list):
        for i, value in enumerate(content):
            yield from numbers_of(value, f"{name}.{i}")
    else:
        yield name, content
