"""Input tokens with a blank in their place, and the scores of the rows that hold such blanks.

A word becomes the blank token. A patch of a picture, a position of sound, or a vector that the caller gives in the
place of a token, becomes what the same example gives there when it holds nothing but its own mean: of each channel over
all pixels, of each feature over time, of each component over all vectors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from headwater.analyses._inputs.entrances import Change, Entrance, entering, has_words, run_from
from headwater.analyses._inputs.inputs import Entering, Inputs, Value
from headwater.analyses._measures.blanks import blank_id
from headwater.analyses._prompts.examples import Batch
from headwater.lens.errors import AnalysisError
from headwater.lens.model import HookedModel
from headwater.lens.models.inputs import VECTORS
from headwater.lens.models.signature import FLOATS, markers, time_axis
from headwater.lens.naming.tokens import Tokens

MEANS = "the mean of each picture, sound or row of vectors"


@dataclass(frozen=True, eq=False)
class Blanks:
    """The blanks of all sides: `filler` is the token for words, None where no side has words."""

    inputs: Inputs
    filler: int | None

    @classmethod
    def of(cls, inputs: Inputs, blank: str | None) -> Blanks:
        """The blank as named, else the model's own. AnalysisError for a token where nothing is a word."""
        model = inputs.model
        first = inputs.batches[0].ids
        if any(has_words(side, first) for side in inputs.sides):
            return cls(inputs, blank_id(model, blank))
        if blank is not None:
            raise AnalysisError(
                f"blank={blank!r} names a token, and {model.name} reads no words here: patches and frames become "
                f"{MEANS}; leave it out"
            )
        return cls(inputs, None)

    @property
    def told(self) -> int | str:
        """For the attributes of a result."""
        return MEANS if self.filler is None else self.filler

    def vectors(self, at: Entering) -> list[Tensor]:
        """The vectors of a batch of which every token is a blank."""
        every = [torch.ones(len(at.batch.places), len(each.places), dtype=torch.bool) for each in at.where]
        words = self._words(at.batch, torch.arange(len(at.batch.places)), every)
        given = _at_their_means(self.inputs.model, words)
        return entering(self.inputs.model, given, at.where)

    def scores(self, batch: Batch, value: Value, gone: Tensor, size: int) -> Tensor:
        """The score of each form of the texts of a batch, float64 [text, form]; `gone` [text, form, key] are blanks."""
        count, each, _ = gone.shape
        forms = gone.flatten(0, 1)
        texts = torch.arange(count).repeat_interleave(each)
        where = self.inputs.entrances(batch)
        media = [
            not has_words(side, batch.ids) or place.before
            for side, place in zip(self.inputs.sides, where, strict=True)
        ]
        means: list[Tensor] = []
        if any(media):
            kept = [place for place, other in zip(where, media, strict=True) if other]
            means = entering(self.inputs.model, _at_their_means(self.inputs.model, batch.ids), kept)
        found = []
        for i in range(0, len(forms), size):
            some = texts[i : i + size]
            parts = list(forms[i : i + size].split([len(place.places) for place in where], 1))
            found.append(value(self._run(batch, some, parts, where, media, means), some).double().cpu())
        return torch.cat(found).view(count, each)

    def _run(
        self, batch: Batch, texts: Tensor, gone: list[Tensor], where: list[Entrance], media: list[bool],
        means: list[Tensor],
    ) -> Tensor:  # fmt: skip
        """The outputs of rows: words are replaced as ids, what is no word at its entrance."""
        given = self._words(batch, texts, gone)
        kept, changes = [], []
        for side, place, mask, other in zip(self.inputs.sides, where, gone, media, strict=True):
            if other:
                mask = (
                    mask & ~_words_in(side, _ids(side, given)).to(mask.device)
                    if has_words(side, given)
                    else mask
                )
                mine, blank = mask[:, place.places], means[len(kept)][texts]
                kept.append(place)
                changes.append(_putting(mine, blank))
        return run_from(self.inputs.model, given, kept, changes)

    def _words(self, batch: Batch, texts: Tensor, gone: list[Tensor]) -> Tensor:
        """Rows of a batch with the blank token in the place of words that are gone."""
        given = batch.rows(texts)
        for side, mask in zip(self.inputs.sides, gone, strict=True):
            if not has_words(side, given):
                continue
            assert self.filler is not None
            ids = _ids(side, given)
            ids = torch.where(mask.to(ids.device) & _words_in(side, ids), self.filler, ids)
            if side.parts[side.part_name].queries == "encoder":
                given = _with(given, {"input_ids": ids})
            else:
                given = given.changed(ids, given.mask) if isinstance(given, Tokens) else ids
        return given


def _putting(gone: Tensor, blank: Tensor) -> Change:
    return lambda rows: torch.where(gone.to(rows.device)[..., None], blank.to(rows), rows)


def _ids(side: HookedModel, given: Tensor) -> Tensor:
    """The ids of the words of a side, [row, position]."""
    encoding = side.parts[side.part_name].queries == "encoder"
    return given.more["input_ids"] if encoding and isinstance(given, Tokens) else given.as_subclass(Tensor)


def _words_in(side: HookedModel, ids: Tensor) -> Tensor:
    """Which ids are of words, and no places of pictures or sound."""
    return ~torch.isin(ids, torch.tensor(list(markers(side.hf).values()), dtype=ids.dtype, device=ids.device))


def _with(given: Tensor, more: Mapping[str, Tensor]) -> Tokens:
    assert isinstance(given, Tokens)
    return given.changed(given.ids, given.mask, {**given.more, **more})


def _at_their_means(model: HookedModel, given: Tensor) -> Tensor:
    """The same rows with every picture and sound at its own mean."""
    if not isinstance(given, Tokens):
        return given
    grids = given.more.get("image_grid_thw")
    means = {
        name: _mean(name, found, grids, time_axis(model.hf, found))
        for name, found in given.more.items()
        if name in (*FLOATS, VECTORS)
    }
    return _with(given, means)


def _mean(name: str, found: Tensor, grids: Tensor | None, time: int) -> Tensor:
    """A picture [..., height, width], sound [row, feature, time], [row, sample] or [row, time, feature], or vectors
    [row, position, feature] at their mean; a picture in patches [row, patch, feature], or packed [patch, feature], at
    its mean patch."""
    if name == "pixel_values" and found.dim() == 2 and grids is not None:
        pictures = found.split([int(count) for count in grids.prod(-1)])
        return torch.cat([each.mean(0, keepdim=True).expand_as(each) for each in pictures])
    if name == "pixel_values":
        axes = (-2, -1) if found.dim() > 3 else (-2,)
    else:
        axes = (1,) if name == VECTORS or (name == "input_values" and found.dim() == 3) else (time,)
    return found.mean(axes, keepdim=True).expand_as(found)
