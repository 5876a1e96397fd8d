"""`Reading`: what a unit gives to the model, and the key of its result; driver and workers read alike."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from headwater.analyses._corpora.shards import Shard
from headwater.analyses._corpora.sources import Row
from headwater.analyses._corpora.tokens import fitting, tokens_of
from headwater.analyses._sweeps.asked import Pair
from headwater.analyses._sweeps.sweep import Sweep
from headwater.analyses._sweeps.texts import Texts
from headwater.analyses._sweeps.unit import Unit
from headwater.analyses._sweeps.units import Units
from headwater.lens.errors import HeadwaterError, PromptError
from headwater.lens.experiments.prompt import Prompt
from headwater.lens.files import digest_of
from headwater.lens.model import HookedModel

AXES = ("format", "model", "prompts", "corpus", "pairs", "layers", "analyses", "edits", "seeds")


class Read(NamedTuple):
    """What the analysis reads; answers that stand beside a prompt, as settings; what the unit's file tells of it; what
    else decides it, as plain data; and its name in messages."""  # fmt: skip

    given: list[Any]
    own: dict[str, Any]
    told: dict[str, Any]
    about: dict[str, Any]
    name: str


class Reading:
    """A sweep on an opened model, with the `facts` of its run. `base` is the sweep's folder."""

    def __init__(self, sweep: Sweep, model: HookedModel, facts: Mapping[str, Any], base: Path) -> None:
        self.sweep, self.model, self.facts, self.base = sweep, model, facts, base
        self.texts = None if sweep.corpus is None else Texts(sweep.corpus, base)
        self._length = 0 if sweep.corpus is None else fitting(model, sweep.corpus.length)
        shared = {name: value for name, value in sweep.model_dump(mode="json").items() if name not in AXES}
        self._run = digest_of({"facts": dict(facts), **shared})
        self._edits = {name: digest_of(listed) for name, listed in sweep.edits.items()}

    def keys(self, units: Units, shard: Shard) -> Iterator[tuple[str, int]]:
        """The key and the number of each unit of a shard; everything is read once."""
        for kind, count in units.kinds().items():
            rows = self.texts.checked(self.facts) if kind == "text" and self.texts else [None] * count
            for at, row in enumerate(rows):
                digest = ""
                for number in filter(shard.takes, units.of(kind, at)):
                    unit = units[number]
                    digest = digest or self.digest(self.read(unit, row))
                    yield self.key(unit, digest), number

    def read(self, unit: Unit, row: Row | None = None) -> Read:
        """What a unit reads; `row` is its text, where that is one of the corpus (None: it is looked up)."""
        if unit.kind == "text":
            assert self.texts is not None
            return self._text(row or self.texts.at(unit.at))
        given, own = given_of(unit, self.base)
        return Read(given, own, unit.given, {"own": own}, f"{unit.kind} {unit.at}")

    def digest(self, read: Read) -> str:
        """Of what is read, with the token ids that the model makes of it."""
        sides = [side for each in read.given for side in (each if isinstance(each, tuple) else _sides(each))]
        try:
            ids = [self.model.to_tokens(side).ids.tolist() for side in sides]
        except HeadwaterError as error:
            raise PromptError(f"{read.name}: {error}") from None
        return digest_of({"given": read.told, "ids": ids, **read.about})

    def key(self, unit: Unit, digest: str) -> str:
        """The key of a unit that reads what has this digest."""
        return unit.key(self._run, digest, self._edits[unit.edits])

    def _text(self, row: Row) -> Read:
        try:
            ids, cut = tokens_of(self.model, row.text, self._length)
        except HeadwaterError as error:
            raise PromptError(f"{row.where}: {error}") from None
        told = {"where": row.where, "tokens": len(ids), "cut": cut}
        return Read([ids if cut else row.text], {}, told, {"text": row.text}, row.where)


def given_of(unit: Unit, base: Path | None) -> tuple[list[Any], dict[str, Any]]:
    """What the analysis reads of the sweep's own prompts or pairs, and the answers beside a prompt, as settings."""
    if not unit.kind:
        return [], {}
    if unit.kind == "pair":
        pair = Pair(**unit.given)
        clean, corrupt = pair.clean.given(base), pair.corrupt.given(base)
        if pair.answer is None:
            return [(clean, corrupt)], {}
        return [SimpleNamespace(prompt=clean, corrupt=corrupt, answer=pair.answer, wrong=[pair.wrong])], {}
    prompt = Prompt(**unit.given)
    own = {"answer": prompt.answer, "wrong": prompt.wrong[0] if prompt.wrong else None}
    return [prompt.given(base)], {name: value for name, value in own.items() if value is not None}


def _sides(given: Any) -> list[Any]:
    return [given.prompt, given.corrupt] if hasattr(given, "corrupt") else [given]
