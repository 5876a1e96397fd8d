"""`Example`: all that one run of a model reads for one example, as a user has it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from headwater.lens.errors import PromptError
from headwater.lens.media.pictures import Picture
from headwater.lens.media.sounds import Sound


@dataclass(frozen=True, eq=False, kw_only=True)
class Example:
    """One example: text or token ids, pictures, a sound, what the decoder reads, and what is right.

    `text`: a text, a pair of texts or chat messages. `ids`: token ids [position], in the place of a text. `image`: a
    picture or a list of them (the frames of a film, where a model reads films), each a path, bytes, an image of PIL or
    an array [height, width, 3] of 8-bit numbers; the model's own processor scales it. `audio`: a WAV file or (samples
    [sample], samples a second). `decoder`: the text or the ids that an encoder–decoder writes. `label`: what is right,
    a class (number or name) or the word at the mask; losses read it. `more`: further inputs under transformers' names,
    as for a batch of one. Every method of a model and every analysis takes an `Example` or a list of them. PromptError
    says which field does not fit.

    >>> import headwater as hw
    >>> model = hw.load("tasks-4l")
    >>> model.to_tokens([hw.Example(text="Mary gave"), hw.Example(text="When John gave a drink")]).shape
    torch.Size([2, 6])
    >>> model.record(hw.Example(ids=[1, 20, 30])).pattern(layer=2, head=0).shape
    torch.Size([1, 3, 3])
    """

    text: Any = None
    ids: Any = None
    image: Picture | Sequence[Picture] | None = None
    audio: Sound | None = None
    decoder: Any = None
    label: Any = None
    more: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.text is not None and self.ids is not None:
            raise PromptError("an example has text or ids, not both; leave one of them out")
        said = (self.text, self.ids, self.image, self.audio, self.decoder)
        if all(each is None for each in said) and not self.more:
            raise PromptError("an example is empty; give text=, ids=, image=, audio= or decoder=")
        if not isinstance(self.more, Mapping):
            raise PromptError(
                f"more holds inputs by their names, such as {{'token_type_ids': …}}; got {type(self.more).__name__}"
            )

    @property
    def images(self) -> list[Picture]:
        """The pictures, a lone one too."""
        if self.image is None:
            return []
        return list(self.image) if isinstance(self.image, list | tuple) else [self.image]
