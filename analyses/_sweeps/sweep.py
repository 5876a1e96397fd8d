"""`Sweep`: a model, prompts, analyses, edits and seeds as data, from which every unit of work follows.

A sweep file is read like an experiment's: its size is bounded, an unknown key is refused with the one that was meant,
every setting of every analysis is checked before anything runs, and it runs no code.
"""

from __future__ import annotations

import json
import math
import os
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from headwater.analyses._sweeps.asked import Asked, Pair
from headwater.analyses._sweeps.texts import ACorpus, Corpus, Texts
from headwater.analyses._sweeps.unit import Unit
from headwater.analyses._sweeps.units import Units, told
from headwater.lens.errors import HeadwaterError, SweepError, first_line
from headwater.lens.experiments import edits_on_parts
from headwater.lens.experiments.faults import first_fault
from headwater.lens.experiments.prompt import APrompt, File, Prompt
from headwater.lens.files import as_path, parse_json, read_text

FORMAT = 1
MOST_BYTES = 64 * 2**20
MOST_COMBINATIONS = 10**6  # of settings, which are kept in memory
CUT = "a model whose layers are cut over devices is not read; take one that a device holds, or fewer bits (dtype)"
TOO_LARGE = {  # what is asked of a model that no single device holds
    "device_map": "a sweep opens its model whole on one device; take one that a device holds, or fewer bits (dtype)",
    "tp_plan": CUT, "tp_size": CUT, "tensor_parallel": CUT,
}  # fmt: skip
Named = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]


AnEdit = Annotated[dict[str, Any], BeforeValidator(edits_on_parts.as_data)]
Layers = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1, max_length=10_000)]


class Sweep(BaseModel):
    """What is asked of a model: units are prompts, texts of a corpus or pairs × layers × analyses × edits × seeds.

    `revision` says which weights (None: any). `threads` are those of each worker, and part of what decides the
    numbers. `layers` are lists of layers, each a unit of its own; without any an analysis sees the whole model. `edits`
    are lists of edits by name, `{"none": []}` where nothing is changed. `seeds` are for analyses that draw. `corpus`
    is a file or folder of texts in the sweep's folder, in the place of prompts: `"texts.jsonl"`, or with `field`,
    `unit`, `texts` and `length` as in `corpus`; how many units there are is then told by `sweep.units(base)`.

    >>> import headwater as hw
    >>> sweep = hw.Sweep(
    ...     model="tasks-4l", prompts=["Mary gave John a drink"], layers=[[0, 1], [2, 3]],
    ...     analyses=[{"analysis": "rollout"}, {"analysis": "sink_rate", "each": {"threshold": [0.3, 0.5]}}],
    ... )
    >>> len(sweep)
    6
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    format: Literal[1] = FORMAT
    model: str = Field(min_length=1, max_length=4096)
    revision: str | None = None
    dtype: Literal["float32", "float64", "bfloat16", "float16"] = "float32"
    device: str = Field(default="cpu", pattern=r"^(cpu|cuda)$")
    threads: int = Field(default=1, ge=1, le=1024)
    prepend_bos: bool | None = None
    part: str | None = Field(default=None, min_length=1, max_length=100)
    prompts: list[APrompt] = Field(default=[], max_length=1_000_000)
    corpus: ACorpus | None = None
    pairs: list[Pair] = Field(default=[], max_length=1_000_000)
    layers: list[Layers] = Field(default=[], max_length=10_000)
    analyses: list[Asked] = Field(min_length=1, max_length=1000)
    edits: dict[Named, Annotated[list[AnEdit], Field(max_length=1000)]] = Field(
        default={"none": []}, min_length=1, max_length=10_000
    )
    seeds: list[Annotated[int, Field(ge=0, lt=2**63)]] = Field(default=[0], min_length=1, max_length=100_000)

    def __init__(self, **data: Any) -> None:
        for name in TOO_LARGE.keys() & data.keys():
            raise SweepError(f"{name}: {TOO_LARGE[name]}")
        try:
            super().__init__(**data)
        except ValidationError as error:
            raise SweepError(first_fault(error, "the sweep", KEYS)) from None

    @model_validator(mode="after")
    def _all_used(self) -> Sweep:
        """What would be given for nothing is refused, and so is an analysis that lacks its inputs."""
        if self.prompts and self.corpus:
            raise SweepError("a sweep reads prompts or a corpus; leave one of them out")
        reads = {asked.analysis: asked.entry.inputs for asked in self.analyses}
        for name, inputs in reads.items():
            wanted = "pairs" if inputs == "model+pairs" else "corpus" if self.corpus else "prompts"
            if inputs != "model" and not getattr(self, wanted):
                raise SweepError(f"{name} reads {wanted}, and the sweep has none; give {wanted}")
        if self.pairs and "model+pairs" not in reads.values():
            raise SweepError("no analysis of the sweep reads pairs; leave them out")
        if (self.prompts or self.corpus) and not {"record", "model+examples"} & set(reads.values()):
            useless = "prompts; leave them out" if self.prompts else "a corpus; leave it out"
            raise SweepError(f"no analysis of the sweep reads {useless}")
        combinations = [math.prod(map(len, asked.each.values())) for asked in self.analyses]
        if (most := sum(combinations)) > MOST_COMBINATIONS:  # before they are listed
            raise SweepError(
                f"each gives {told(most)} combinations of settings; the most is {MOST_COMBINATIONS:,}; divide it"
            )
        self.units_of(None if self.corpus is None else 1)  # refused where they are too many
        for asked in self.analyses:
            if self.layers and not asked.by_layers:
                raise SweepError(
                    f"{asked.analysis} reads every layer; leave layers out, or give it a sweep of its own"
                )
            if len(self.seeds) > 1 and not asked.draws:
                raise SweepError(f"{asked.analysis} draws nothing that a seed decides; give one seed")
        for name in ("layers", "seeds"):
            values = getattr(self, name)
            if len({json.dumps(value) for value in values}) < len(values):
                raise SweepError(f"{name} holds a value twice; give it once")
        return self

    def __len__(self) -> int:
        return len(self._own)

    def unit(self, number: int) -> Unit:
        """The unit of that number; the prompts change first, then layers, seeds, edits and settings."""
        return self._own[number]

    def units(self, base: str | os.PathLike[str] = ".") -> Units:
        """All units; the texts of a corpus are counted, which lies in the folder `base`, that of the sweep file."""
        if self.corpus is None:
            return self._own
        return self.units_of(Texts(self.corpus, as_path(base, SweepError)).facts()["texts"])

    def units_of(self, texts: int | None) -> Units:
        """All units, where so many texts are read of the corpus (None: there is none)."""
        return Units(
            self.analyses, list(self.edits), self.seeds, self.layers, self.prompts, self.pairs, texts
        )

    @cached_property
    def _own(self) -> Units:
        if self.corpus is not None:
            raise SweepError(
                "how many units a sweep of a corpus has is known when its texts are counted; ask sweep.units(base)"
            )
        return self.units_of(None)

    @classmethod
    def from_json(cls, text: str, name: str = "the sweep") -> Sweep:
        """Read a sweep; every fault is one line."""
        return cls.of(parse_json(text, name, SweepError), name)

    @classmethod
    def of(cls, data: Any, name: str) -> Sweep:
        """A sweep from plain data that a file of that name gave."""
        if not isinstance(data, dict):
            raise SweepError(f"{name} holds a {type(data).__name__}; a sweep is an object")
        try:
            return cls(**data)
        except HeadwaterError as error:
            raise SweepError(f"{name}: {error}") from None
        except (TypeError, ValueError, RecursionError) as error:
            raise SweepError(f"{name} is no sweep: {first_line(error)}") from None

    @classmethod
    def open(cls, path: str | Path) -> Sweep:
        """Read a sweep file."""
        return cls.from_json(read_text(as_path(path, SweepError), MOST_BYTES, SweepError), str(path))


KEYS = tuple(
    {
        *Sweep.model_fields,
        *Asked.model_fields,
        *Pair.model_fields,
        *Prompt.model_fields,
        *File.model_fields,
        *Corpus.model_fields,
    }
)
