"""Edits as data that name the part of the model on which they act, as experiments and addresses hold them.

Besides the fields of the edit such data may have `part`: `{"edit": "ScaleHeads", "factors": {"1.0": 0.0}, "part":
"encoder"}`. Without it the edit acts on the part from which the model is seen.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headwater.lens.attention import context
from headwater.lens.edits import Edit, edit_from_dict
from headwater.lens.edits.patterns import named_files
from headwater.lens.errors import EditError
from headwater.lens.files import Fault, within

if TYPE_CHECKING:
    from headwater.lens.model import HookedModel

LONGEST = 100  # letters of a part's name
PartEdit = tuple[str, Edit]


def read(data: Mapping[str, Any]) -> PartEdit:
    """The part, "" where none is named, and the edit. EditError for what is neither."""
    if not isinstance(data, Mapping):
        return "", edit_from_dict(data)
    part = data.get("part", "")
    if not isinstance(part, str) or len(part) > LONGEST:
        raise EditError(f"the part of an edit is a name such as 'encoder'; got {str(part)[:60]!r}")
    return part, edit_from_dict({name: value for name, value in data.items() if name != "part"})


def as_data(given: Any) -> Any:
    """An edit as data; it is made once to see that it can be."""
    data = given.to_dict() if isinstance(given, Edit) else given
    read(data)
    return data


def contained(data: Mapping[str, Any], folder: Path | None, fault: Fault, whose: str) -> dict[str, Any]:
    """The data with record files named by where they lie in the folder, which is that of the `whose` file."""
    changed = dict(data)
    for name, value in named_files(data).items():
        inside = None if folder is None else within(folder, value)
        if inside is None:
            raise fault(
                f"{data['edit']}: the record {value!r} does not lie in the {whose}'s folder; copy it there"
            )
        changed[name] = str(inside)
    return changed


def by_part(model: HookedModel, edits: Iterable[PartEdit]) -> dict[str, list[Edit]]:
    """The edits of each part in their order, the parts in that of their first edits."""
    found: dict[str, list[Edit]] = {}
    for part, edit in edits:
        found.setdefault(part or model.part_name, []).append(edit)
    return found


@contextlib.contextmanager
def editing(model: HookedModel, edits: Iterable[PartEdit]) -> Iterator[None]:
    """Inside, each edit acts on its part, in every run of the model: blocks `model.part(name).edit(…)`, one in another.

    ModelError for a part that the model lacks, EditError for an edit that does not fit its part.
    """
    with contextlib.ExitStack() as stack:
        for part, of_part in by_part(model, edits).items():
            stack.enter_context(model.part(part).edit(*of_part))
        yield


@contextlib.contextmanager
def unedited(model: HookedModel) -> Iterator[None]:
    """Inside, no edit of any part is on."""
    with contextlib.ExitStack() as stack:
        for key in model.part_keys.values():
            stack.enter_context(context.unedited(key))
        yield
