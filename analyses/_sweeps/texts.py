"""`Texts`: the texts of a corpus that a sweep names, each of which is a prompt, read one after the other.

Nothing of a corpus is in memory but the text that is read. Blank texts are left out. A run has the digest of all others
in its manifest, and each unit that of its text in its key.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator

from headwater.analyses._corpora.sources import Row, Source, Unit as TextUnit
from headwater.lens.errors import SweepError
from headwater.lens.files import leads_below, within

MOST_TEXTS = 10**8


class Corpus(BaseModel):
    """A file or folder of texts in the sweep's folder, read as `headwater corpus` reads it.

    `field` is the key or column with the text, `unit` what a text of a .txt file is, `texts` how many are read at most,
    `length` how many tokens of a text (None: as many as the model holds).
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    path: str = Field(min_length=1, max_length=4096)
    field: str = Field(default="text", min_length=1, max_length=1000)
    unit: TextUnit = "file"
    texts: int | None = Field(default=None, ge=1, le=MOST_TEXTS)
    length: int | None = Field(default=None, ge=2, le=2**31)

    @field_validator("path")
    @classmethod
    def _inside(cls, value: str) -> str:
        if not leads_below(value):
            raise ValueError(
                "a corpus is named by where it lies in the sweep's folder, without '..' and signs that do not print"
            )
        return value


def _of_path(given: Any) -> Any:
    return {"path": given} if isinstance(given, str) else given


ACorpus = Annotated[Corpus, BeforeValidator(_of_path)]  # a path alone is a corpus too


class Texts:
    """A corpus in the folder `base`; SweepError where it lies outside, also by a link."""

    def __init__(self, asked: Corpus, base: Path) -> None:
        inside = within(base, asked.path)
        if inside is None:
            raise SweepError(f"the corpus {asked.path!r} does not lie in the sweep's folder; copy it there")
        self.asked, self.source = asked, Source.of(inside, asked.field, asked.unit)
        self._reader: Iterator[Row] = iter(())
        self._next = 0

    def rows(self) -> Iterator[Row]:
        """The texts that are no blanks, numbered from 0, and where each stands."""
        number = 0
        for row in islice(self.source, self.asked.texts):
            if row.text.strip():
                yield Row(number, row.where, row.text)
                number += 1

    def facts(self) -> dict[str, Any]:
        """How many texts there are, and the digest of all; SweepError where there are none."""
        found, count = hashlib.sha256(), 0
        for row in self.rows():
            _take(row, found)
            count = row.number + 1
        if not count:
            raise SweepError(
                f"the corpus {self.asked.path!r} holds nothing but blank texts; give another one"
            )
        return {"corpus": f"sha256:{found.hexdigest()}", "texts": count}

    def checked(self, facts: Mapping[str, Any]) -> Iterator[Row]:
        """`rows`; SweepError at their end where they are other texts than those of the facts."""
        found, count = hashlib.sha256(), 0
        for row in self.rows():
            _take(row, found)
            count = row.number + 1
            yield row
        if (f"sha256:{found.hexdigest()}", count) != (facts["corpus"], facts["texts"]):
            raise SweepError(f"the corpus {self.asked.path!r} changed while it was read; begin again")

    def at(self, number: int) -> Row:
        """The text of that number. Later texts are read on from there, an earlier one from the beginning."""
        if number < self._next:
            self._next = 0
        if not self._next:
            self._reader = self.rows()
        for row in self._reader:
            self._next = row.number + 1
            if row.number == number:
                return row
        self._next = 0
        raise SweepError(f"the corpus {self.asked.path!r} has no text {number}")


def _take(row: Row, digest: Any) -> None:
    """Add a text, and where it stands, to a digest; each with its length before it."""
    for part in (row.where.encode("utf-8", "surrogatepass"), row.text.encode("utf-8", "surrogatepass")):
        digest.update(len(part).to_bytes(8, "little") + part)
