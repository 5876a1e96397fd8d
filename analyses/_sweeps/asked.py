"""What a sweep asks: analyses with their settings, prompts, and pairs of prompts."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from headwater.analyses._catalogue.catalogue import Entry, entry
from headwater.lens.errors import AnalysisError, SweepError
from headwater.lens.experiments.prompt import APrompt


class Pair(BaseModel):
    """A clean and a corrupt prompt of equal length, with the clean prompt's answer and the wrong one, where known."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    clean: APrompt
    corrupt: APrompt
    answer: str | None = None
    wrong: str | None = None

    @model_validator(mode="after")
    def _both(self) -> Pair:
        if (self.answer is None) is not (self.wrong is None):
            raise ValueError("a pair has an answer and a wrong one, or neither")
        return self


class Asked(BaseModel):
    """An analysis with its settings. `each` gives a setting several values, and every combination is a unit."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    analysis: str = Field(min_length=1, max_length=100)
    settings: dict[str, Any] = {}
    each: dict[str, Annotated[list[Any], Field(min_length=1, max_length=10_000)]] = {}

    @model_validator(mode="after")
    def _fits(self) -> Asked:
        known = self.entry
        if known.inputs == "circuits":
            raise SweepError(
                f"{known.name} compares two circuit files and runs no model; leave it out of a sweep"
            )
        if both := sorted(self.settings.keys() & self.each.keys()):
            raise SweepError(f"{known.name}: {both[0]} stands in settings and in each; give it once")
        for name, values in ({n: [v] for n, v in self.settings.items()} | self.each).items():
            setting = known.setting(name)
            for value in values:
                setting.check(value)
                listed = isinstance(value, list) and setting.lists_texts
                if setting.opens and value is not None and not listed:
                    told = "give a list of texts" if setting.lists_texts else "leave it out"
                    raise SweepError(
                        f"{known.name}: {name} names a file, which a sweep does not open; {told}"
                    )
        missing = [
            s.name for s in known.settings if s.required and s.name not in {*self.settings, *self.each}
        ]
        if missing:
            raise AnalysisError(
                f"{known.name} needs the setting {missing[0]}: {known.setting(missing[0]).help}"
            )
        return self

    @property
    def entry(self) -> Entry:
        return entry(self.analysis)

    @property
    def by_layers(self) -> bool:
        """Whether it can be asked of a range of layers."""
        return self.entry.inputs == "record" or self._free("layers")

    @property
    def draws(self) -> bool:
        """Whether a seed decides its numbers."""
        return self._free("seed")

    def _free(self, name: str) -> bool:
        known = any(setting.name == name for setting in self.entry.settings)
        return known and name not in self.settings and name not in self.each

    def combinations(self) -> Iterator[dict[str, Any]]:
        """The settings of each unit of one prompt, but for layers and seed."""
        for values in itertools.product(*self.each.values()):
            yield {**self.settings, **dict(zip(self.each, values, strict=True))}
