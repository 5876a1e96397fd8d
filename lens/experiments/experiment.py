"""`Experiment`: a model, prompts, edits and measures as data that runs again anywhere and says whether it agrees.

An experiment file is data from a stranger: its size, every name, number and path in it is checked, it runs no code, and
reads nothing outside of its own folder but embedded and added models and, by a hub id, the model that it names.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from headwater.lens.edits import Edit
from headwater.lens.errors import ExperimentError, HeadwaterError, first_line
from headwater.lens.experiments import edits_on_parts, measures
from headwater.lens.experiments.faults import first_fault
from headwater.lens.experiments.named_model import load_named
from headwater.lens.experiments.prompt import APrompt, File, Prompt
from headwater.lens.experiments.results import Results, numbers_of, versions_now
from headwater.lens.files import as_path, digest_of, parse_json, read_text, write_text
from headwater.lens.naming.tokens import Tokens

if TYPE_CHECKING:
    from headwater.lens.model import HookedModel

MOST_BYTES = 16 * 2**20
FORMAT = 1


def _measure(given: str) -> str:
    measures.check(given)
    return given


class Experiment(BaseModel):
    """What is asked: of which model and weights, on which prompts, under which edits, measured how.

    Every measure is taken without the edits ("before") and, where there are edits, with them ("after"). `revision` says
    which weights (None: any), `part` which part of the model is edited and measured (None: its main part; an edit that
    acts on another one has a field `part` of its own), `prepend_bos` whether a text begins with the token for it
    (None: as the tokenizer makes it), `tolerance` how far a second run's numbers may lie from the first's: absolutely,
    and relative to their size.

    >>> import headwater as hw
    >>> experiment = hw.Experiment(
    ...     model="tasks-4l", prompts=["Mary gave John a drink"], edits=[hw.ScaleHeads({"2.0": 0.0})], measures=["loss"]
    ... )
    >>> hw.Experiment.from_json(experiment.to_json()) == experiment
    True
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    format: Literal[1] = FORMAT
    model: str = Field(min_length=1, max_length=4096)
    revision: str | None = None
    dtype: Literal["float32", "float64", "bfloat16", "float16"] = "float32"
    prepend_bos: bool | None = None
    part: str | None = Field(default=None, min_length=1, max_length=100)
    prompts: list[APrompt] = Field(min_length=1, max_length=100_000)
    edits: list[Annotated[dict[str, Any], BeforeValidator(edits_on_parts.as_data)]] = Field(
        default=[], max_length=1000
    )
    measures: list[Annotated[str, BeforeValidator(_measure)]] = Field(
        default=["loss", "next_token"], min_length=1, max_length=200
    )
    seed: int = Field(default=0, ge=0, lt=2**63)
    tolerance: float = Field(default=1e-4, gt=0, le=1, allow_inf_nan=False)
    versions: dict[str, str] = Field(default_factory=versions_now)

    def __init__(self, **data: Any) -> None:
        try:
            super().__init__(**data)
        except ValidationError as error:
            raise ExperimentError(first_fault(error, "the experiment", KEYS)) from None

    @classmethod
    def from_json(cls, text: str, name: str = "the experiment") -> Experiment:
        """Read what `to_json` wrote; every fault is one line."""
        if len(text) > MOST_BYTES:
            raise ExperimentError(f"{name} is larger than {MOST_BYTES // 2**20} MiB; give a smaller one")
        data = parse_json(text, name, ExperimentError)
        if not isinstance(data, dict):
            raise ExperimentError(f"{name} holds a {type(data).__name__}; an experiment is an object")
        try:
            return cls(**data)
        except HeadwaterError as error:
            raise ExperimentError(f"{name}: {error}") from None
        except (TypeError, ValueError, RecursionError) as error:
            raise ExperimentError(f"{name} is no experiment: {first_line(error)}") from None

    @classmethod
    def open(cls, path: str | Path) -> Experiment:
        """Read an experiment file."""
        return cls.from_json(
            read_text(as_path(path, ExperimentError), MOST_BYTES, ExperimentError), str(path)
        )

    def to_json(self) -> str:
        return json.dumps(self.model_dump(mode="json"), indent=1, ensure_ascii=True, allow_nan=False) + "\n"

    def save(self, path: str | Path) -> Path:
        """Write it, whole or not at all."""
        return write_text(as_path(path, ExperimentError), self.to_json(), ExperimentError)

    def inputs_digest(self) -> str:
        """Of everything that decides the results; the versions do not."""
        late = ("prepend_bos", "part")  # files from before these were fields keep their digest
        unsaid = {name for name in late if getattr(self, name) is None}
        return digest_of(self.model_dump(mode="json", exclude={"versions", *unsaid}))

    def edits_made(self, folder: Path | None = None) -> list[Edit]:
        """The edits; records that they name are looked for in `folder`, and nowhere else."""
        return [edit for _, edit in self._edits(folder)]

    def _edits(self, folder: Path | None) -> list[edits_on_parts.PartEdit]:
        """Each edit with its part, "" for the experiment's."""
        return [
            edits_on_parts.read(edits_on_parts.contained(edit, folder, ExperimentError, "experiment"))
            for edit in self.edits
        ]

    def load(self, folder: Path | None = None) -> HookedModel:
        """The model it names: an embedded or added one, one in `folder`, or a hub id."""
        return load_named(self.model, folder, self.dtype)

    def run(
        self, model: HookedModel | None = None, *, folder: str | Path | None = None,
        done: Mapping[int, Any] | None = None, tell: Callable[[int, dict[str, Any]], object] | None = None,
    ) -> Results:  # fmt: skip
        """`Results` of every prompt. `model` takes the place of the one that is named; its weights must be the same.

        `done` are results of some prompts from an earlier run, which are not run again; `tell` hears of each new one.
        """
        place = None if folder is None else Path(folder)
        opened = self.load(place) if model is None else model
        if self.revision is not None and not opened.weights_digest.matches(self.revision):
            raise ExperimentError(
                f"the experiment is of weights {self.revision}, {opened.name} has {opened.revision}; leave out the "
                "revision to take them all the same"
            )
        if opened.prepend_bos is not None and opened.prepend_bos is not self.prepend_bos:
            raise ExperimentError(
                f"the model was loaded with prepend_bos={opened.prepend_bos} and the experiment says "
                f"{self.prepend_bos}; load it without, and give the experiment prepend_bos={opened.prepend_bos}"
            )
        if any(opened.part(name).edits for name in opened.parts):
            raise ExperimentError("the model has edits on already; run the experiment outside of model.edit")
        if self.part is not None:
            opened = opened.part(self.part)
        found = dict(done or {})
        self.check_files(place)
        left = [number for number in range(len(self.prompts)) if number not in found]
        for number in left:  # what is wrong with the last prompt is said before the first runs
            self._asked(opened, number, place)
        edits = self._edits(place) if left else []
        with torch.random.fork_rng(devices=[]), edits_on_parts.editing(opened, edits):
            torch.manual_seed(self.seed)
            for number in left:  # read once more: the pictures of all prompts may not fit into memory
                found[number] = _finite(self._measured(opened, *self._asked(opened, number, place)), number)
                if tell is not None:
                    tell(number, found[number])
        return Results.of(
            self.inputs_digest(), opened, [found[number] for number in range(len(self.prompts))]
        )

    def check_files(self, folder: Path | None) -> int:
        """How many pictures and sounds there are, each held to its digest; ExperimentError tells of another file."""
        seen: set[File] = set()
        for number, prompt in enumerate(self.prompts):
            for file in prompt.files:
                if file not in seen:
                    with _told_of(number):
                        file.read(folder)
                    seen.add(file)
        return len(seen)

    def _asked(
        self, model: HookedModel, number: int, folder: Path | None
    ) -> tuple[Tokens, int | None, list[int]]:
        """A prompt as the model reads it, its answer, and the wrong ones."""
        prompt = self.prompts[number]
        with _told_of(number):
            read = model.to_tokens(
                prompt.given(folder), prepend_bos=self.prepend_bos if prompt.text is not None else None
            )
        where, right = f"prompt {number}", prompt.answer
        answer = None if right is None else measures.named(model, right, f"{where}: answer")
        return read, answer, [measures.named(model, word, f"{where}: wrong") for word in prompt.wrong]

    def _measured(
        self, model: HookedModel, tokens: Tokens, answer: int | None, wrong: list[int]
    ) -> dict[str, Any]:
        """Every measure of one prompt, with the experiment's edits on around."""
        with edits_on_parts.unedited(model):
            hidden = model.embeddings(tokens) if "similarity" in self.measures else None
            result = {"before": measures.measure(model, tokens, self.measures, answer, wrong, None)}
        if self.edits:
            result["after"] = measures.measure(model, tokens, self.measures, answer, wrong, hidden)
        return result


@contextlib.contextmanager
def _told_of(number: int) -> Iterator[None]:
    """Errors say which prompt they are about."""
    try:
        yield
    except HeadwaterError as error:
        raise ExperimentError(f"prompt {number}: {error}") from None


def _finite(result: dict[str, Any], number: int) -> dict[str, Any]:
    """The result of a prompt; numbers that JSON does not have are refused."""
    for where, value in numbers_of(result, f"prompt {number}"):
        if isinstance(value, float) and not math.isfinite(value):
            raise ExperimentError(
                f"{where} is {value}, which results can not hold; leave that measure or the edits out"
            )
    return result


KEYS = (*Experiment.model_fields, *Prompt.model_fields, *File.model_fields)
