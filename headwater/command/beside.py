"""What is given beside prompts or without them, as examples: pictures, sounds, decoder texts and labels.

An example is made for each prompt; without prompts, for each picture; without pictures, for each sound. What is given
once belongs to every example, else it is given once for each. A model of films takes the pictures as frames, those of
one film after those of another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headwater.lens.errors import PromptError

if TYPE_CHECKING:
    from headwater.lens.examples.example import Example

MOST_FILES = 256


@dataclass(frozen=True)
class Beside:
    """The options of one command line, each in the order in which it was given."""

    images: Sequence[Path] = ()
    sounds: Sequence[Path] = ()
    decoders: Sequence[str] = ()
    labels: Sequence[str] = ()

    @classmethod
    def of(cls, *given: Sequence[Any] | None) -> Beside:
        """From what typer gives, where None stands for nothing."""
        return cls(*(tuple(each or ()) for each in given))

    def __bool__(self) -> bool:
        return bool(self.images or self.sounds or self.decoders or self.labels)

    @property
    def stand_alone(self) -> bool:
        """Whether there may be an example without a prompt."""
        return bool(self.images or self.sounds)


def examples(texts: list[str], beside: Beside, frames: int = 1) -> list[str] | list[Example]:
    """One example for each prompt, or for each picture or sound; the prompts alone where nothing is beside them.

    With more `frames` than one, so many pictures are one film.
    """
    if not beside:
        return texts
    if len(beside.images) % frames:
        raise PromptError(
            f"--image is given {len(beside.images)} times, and a film has {frames} frames; give --image {frames} times "
            "for each film"
        )
    films = range(0, len(beside.images), frames)
    main, listed = next(
        each for each in (("prompt", texts), ("--image", films), ("--audio", beside.sounds)) if each[1]
    )
    count = len(listed)
    options: tuple[tuple[str, Sequence[Any]], ...] = ("--image", films), ("--audio", beside.sounds)
    options += ("--decoder", beside.decoders), ("--label", beside.labels)
    for name, given in options:
        if len(given) not in (0, 1, count):
            raise PromptError(
                f"{name} is given {len(given)} times with {count} {main}{'s' * (main == 'prompt' and count != 1)}; "
                f"give it once for all, or once for each {main}"
            )
    if len(beside.images) + len(beside.sounds) > MOST_FILES:
        raise PromptError(f"more than {MOST_FILES} pictures and sounds are given; give fewer at a time")
    from headwater.lens.examples.example import Example
    from headwater.lens.media.pictures import pictures

    images: list[Any] = pictures((str(path), path) for path in beside.images)
    images = [images[n : n + frames] for n in films] if frames > 1 else images

    def of(given: Sequence[Any], row: int) -> Any:
        return None if not given else given[row if len(given) > 1 else 0]

    return [
        Example(
            text=of(texts, row),
            image=of(images, row),
            audio=of(beside.sounds, row),
            decoder=of(beside.decoders, row),
            label=of(beside.labels, row),
        )
        for row in range(count)
    ]
