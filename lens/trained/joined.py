"""Models that are joined of trained ones: the folder holds a projector, and `parts.json` names the models beside it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

from headwater.lens.errors import ModelError
from headwater.lens.files import parse_json, read_text
from headwater.lens.models.embedded import FOLDER, about_folder
from headwater.lens.trained import registry

PARTS, PARTS_BYTES, PROJECTOR = "parts.json", 2**12, "projector.safetensors"


@dataclass(frozen=True)
class Joined:
    """A joined model: its folder, and the names of its language model and of its tower."""

    name: str
    path: Path
    about: str
    language_model: str
    vision_tower: str

    @property
    def parts(self) -> tuple[str, str]:
        return self.language_model, self.vision_tower

    @property
    def is_there(self) -> bool:
        """Whether both parts lie in the cache."""
        return all(registry.is_added(name) for name in self.parts)

    def folders(self) -> tuple[Path, Path]:
        """The folders of both parts, checked; ModelError says what must be added first."""
        if missing := [name for name in self.parts if not registry.is_added(name)]:
            size = registry.megabytes(sum(registry.TRAINED[name].download for name in missing))
            raise ModelError(
                f"{self.name} is made of {' and '.join(self.parts)}, and {' and '.join(missing)} "
                f"{'has' if len(missing) == 1 else 'have'} not been added; `headwater models add {self.name}` fetches "
                f"what is missing ({size})"
            )
        return registry.added_folder(self.language_model), registry.added_folder(self.vision_tower)


@cache
def joined() -> dict[str, Joined]:
    """{name: joined model} of those that come with Headwater."""
    found = {}
    for file in sorted(FOLDER.glob(f"*/{PARTS}")):
        told = parse_json(read_text(file, PARTS_BYTES, ModelError), str(file), ModelError)
        name = file.parent.name
        found[name] = Joined(name, file.parent, about_folder(file.parent)["description"], **told)
    return found
