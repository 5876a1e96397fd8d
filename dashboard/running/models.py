"""The models and saved records that the dashboard offers, and those that are held in memory.

Nobody changes a held model: edits travel with the call that runs under them.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import psutil

import headwater as hw
from headwater.dashboard.running.held import held
from headwater.dashboard.state import own_records
from headwater.dashboard.state.kept import Files
from headwater.lens.errors import HeadwaterError, ModelError
from headwater.lens.models.embedded import embedded
from headwater.lens.trained.registry import TRAINED, bytes_on_disk, is_added

FIRST_MODEL, FALLBACK = "smollm2-135m", "tasks-4l"
READ = ("text", "pictures")  # what the dashboard can give a model
_given: dict[str, str] = {}
_records = Files(psutil.virtual_memory().total // 16, least=2)
_prompts: dict[str, str] = {}  # what a model begins with, where the user said it


def allow(model: str | None) -> list[str]:
    """Offer `model` besides the embedded and added ones; gives the names offered, the one to be shown first.

    A folder, or the file of a record, is offered under its own name, so that no path stands in an address, and no
    address names a file that was not given here.
    """
    if model:
        path = Path(model).expanduser()
        name = path.resolve().name if path.exists() else model
        if name in _given and path.is_file() and source(name) != str(path.resolve()):
            name = f"{path.resolve().parent.name}/{name}"
        _given[name] = model
    return offered()


def is_record(name: str) -> bool:
    """Whether what is offered under a name is the file of a record, and no model; uploaded ones too."""
    return own_records.path(name) is not None or (
        name in _given and Path(_given[name]).expanduser().is_file()
    )


def called(name: str) -> str:
    """What a model or record is called where a person reads it: of an uploaded record the digest is cut."""
    digest = name.removeprefix(own_records.PREFIX)
    return name if digest == name else f"upload {digest[:6]}"


def offered() -> list[str]:
    """Models given at the start, then added ones, then those that come with Headwater; texts before pictures."""
    found = []
    for kind in READ:
        added = [name for name, each in TRAINED.items() if each.reads == kind and is_added(name)]
        shipped = [name for name, each in embedded().items() if each["reads"] == kind]
        found += [*added, *sorted(shipped, key=lambda name: (name != FALLBACK, name))]
    names = list(dict.fromkeys([*reversed(_given), *found]))
    if not names:
        raise ModelError(
            "no model is embedded and none is given: headwater dashboard MODEL opens a folder or a hub id"
        )
    return names


def open_first() -> None:
    """Load what is shown where no model was named: a trained one, or, said in a line, one that comes with Headwater."""
    try:
        resident(FIRST_MODEL)
    except HeadwaterError as error:
        print(f"{error}. The dashboard opens on {FALLBACK}.", file=sys.stderr, flush=True)
        resident(allow(FALLBACK)[0])


def begin_with(prompt: str | None) -> None:
    """Let the model that is shown first begin with a text."""
    if prompt:
        _prompts[offered()[0]] = prompt


def prompt_of(name: str) -> str | None:
    return _prompts.get(name)


def source(name: str) -> str:
    """What `headwater.load` takes for a model offered as `name`, from any folder: a path in full."""
    if (uploaded := own_records.path(name)) is not None:
        return str(uploaded)
    given = _given.get(name, name)
    path = Path(given).expanduser()
    return str(path.resolve()) if name in _given and path.exists() else given


def weights_on_disk(name: str) -> int | None:
    """Bytes of a model's weights, before it is loaded; None where they do not lie on this machine."""
    if name in TRAINED:
        return bytes_on_disk(name)
    known = embedded().get(name)
    folder = Path(known["path"]) if known is not None else Path(source(name))
    files = list(folder.glob("**/*.safetensors")) if folder.is_dir() else []
    return sum(file.stat().st_size for file in files) if files else None


def resident(name: str) -> hw.HookedModel:
    """The model, loaded once for all sessions. ModelError for a record, which holds none."""
    if is_record(name):
        raise ModelError(f"{called(name)} is the record of a run and holds no model, which this needs")
    return held(name, lambda: hw.load(source(name)))


def record(name: str) -> hw.Record:
    """The record that is offered under a name. RecordError for a file that is none, or that is gone."""
    return _opened_record(name)[1]


def record_key(name: str) -> tuple[str, ...]:
    """What tells a record from one that stands in its place later."""
    return "record", source(name), *map(str, _opened_record(name)[0])


def model_of_record(name: str) -> str:
    """The model that a record is of, as it says itself; "" where it does not."""
    return str(record(name).provenance.get("model", ""))[:100]


def offered_model_of(name: str) -> str | None:
    """The model of a record, where it is offered here."""
    return found if (found := model_of_record(name)) in offered() else None


def _opened_record(name: str) -> tuple[tuple[int, int], hw.Record]:
    return _records.get(f"record {name[:20]}", Path(source(name)), hw.Record.open)


@dataclass(frozen=True)
class Reads:
    """What a model reads: a text, a picture, the frames of a film, and what its decoder writes."""

    text: bool
    picture: bool
    film: bool
    decoder: bool


def reads(model: hw.HookedModel) -> Reads:
    """What can be given to a model here. ModelError where that is nothing."""
    names = set(model.parts)
    sees = "vision" in names and model.processor is not None
    film = sees and "video" in type(model.processor).__name__.lower()
    found = Reads(model.tokenizer is not None, sees, film, model.is_encoder_decoder)
    if not found.text and not found.picture:
        raise ModelError(
            f"{model.name} reads neither texts nor pictures that the dashboard could give it (its parts: "
            f"{', '.join(names)}; no tokenizer or processor was found beside it); use headwater record"
        )
    return found
