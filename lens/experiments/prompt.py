"""`Prompt`: what a model reads in one line of an experiment, as text, token ids, pictures and sound, as data.

Pictures and sounds are files in the experiment's folder, each with the digest of its content: a file that is another
than the one that was meant is refused, and the results say by their digest which files were read.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from headwater.lens.errors import ExperimentError
from headwater.lens.examples.example import Example
from headwater.lens.files import leads_below, within
from headwater.lens.media.pictures import pictures
from headwater.lens.media.sources import content

MOST_PICTURES = 64
BESIDE = ("image", "audio", "decoder", "label")


class File(BaseModel):
    """A file in the experiment's folder, and the sha256 of its content in hexadecimal digits (`sha256sum FILE`)."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    file: str = Field(min_length=1, max_length=4096)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")

    @field_validator("file")
    @classmethod
    def _inside(cls, value: str) -> str:
        if not leads_below(value):
            raise ValueError(
                "a file is named by where it lies in the experiment's folder, without '..' and signs that do not print"
            )
        return value

    def read(self, folder: Path | None) -> bytes:
        """Its content; ExperimentError where it lies outside of the folder, also by a link, or is another file."""
        if folder is None:
            raise ExperimentError(
                f"{self.file} lies beside the experiment's file; say where that is, as in run(folder='.')"
            )
        inside = within(folder, self.file)
        if inside is None:
            raise ExperimentError(f"{self.file} does not lie in the experiment's folder; copy it there")
        read, _ = content(inside, "a picture or a sound")
        found = hashlib.sha256(read).hexdigest()
        if found != self.sha256:
            raise ExperimentError(
                f"{self.file} is another file than the experiment's: its sha256 is {found}; take the file that was "
                f"meant, or write the new digest"
            )
        return read


def _listed(given: Any) -> Any:
    return [given] if isinstance(given, dict | File) else given


class Prompt(BaseModel):
    """One prompt: text or token ids, pictures or a sound, what is right, and what some measures ask for.

    `image` is one file or a list of them, `audio` one file; `decoder` is the decoder's text or token ids, `label` the
    right class or masked token.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    text: str | None = Field(default=None, min_length=1)
    tokens: list[int] | None = Field(default=None, min_length=1)
    image: Annotated[list[File] | None, BeforeValidator(_listed)] = Field(
        default=None, min_length=1, max_length=MOST_PICTURES
    )
    audio: File | None = None
    decoder: str | list[int] | None = Field(default=None, min_length=1)
    label: int | str | None = None
    answer: str | int | None = None
    wrong: list[str | int] = []

    @model_validator(mode="after")
    def _something(self) -> Prompt:
        if self.text is not None and self.tokens is not None:
            raise ValueError("a prompt has text or tokens, not both")
        if self.text is self.tokens is self.image is self.audio:
            raise ValueError("a prompt has neither text, tokens, image nor audio; give one of them")
        return self

    @model_serializer(mode="wrap")
    def _as_before(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without what is not there, so that texts have the digest that they had before there were pictures."""
        data = write(self)
        return {name: value for name, value in data.items() if name not in BESIDE or value is not None}

    @property
    def files(self) -> list[File]:
        """The pictures and the sound."""
        return [*(self.image or ()), *((self.audio,) if self.audio else ())]

    def given(self, folder: Path | None) -> str | list[int] | Example:
        """What the model reads; the files are read from `folder`, and their digests are checked."""
        if all(getattr(self, name) is None for name in BESIDE):
            return self.text if self.text is not None else self.tokens or []
        seen = pictures((file.file, file.read(folder)) for file in self.image or ())
        return Example(
            text=self.text,
            ids=self.tokens,
            image=seen[0] if len(seen) == 1 else seen or None,
            audio=None if self.audio is None else self.audio.read(folder),
            decoder=self.decoder,
            label=self.label,
        )


def _of_text(given: Any) -> Any:
    return {"text": given} if isinstance(given, str) else given


APrompt = Annotated[Prompt, BeforeValidator(_of_text)]  # a text alone is a prompt too
