"""`Shard`: one of n parts of what is numbered from 0. Each part takes every n-th; together they are the whole."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from headwater.lens.files import Fault


class Shard(NamedTuple):
    """The part of that number, from 1 to `of`."""

    number: int
    of: int

    @classmethod
    def checked(cls, given: Iterable[int], fault: Fault) -> Shard:
        """What a caller gave as (i, n)."""
        number, of = given
        if type(number) is not int or type(of) is not int or not 1 <= number <= of:
            raise fault(f"shard {number}/{of} does not exist; give 1/{of} to {of}/{of}")
        return cls(number, of)

    @classmethod
    def parse(cls, text: str, fault: Fault) -> Shard:
        """What a person wrote as i/n."""
        number, slash, of = text.partition("/")
        if not (slash and number.isdecimal() and of.isdecimal()):
            raise fault(f"--shard {text!r:.40} can not be read; write it as 3/8")
        return cls.checked((int(number), int(of)), fault)

    def takes(self, number: int) -> bool:
        """Whether what has this number is in the part."""
        return number % self.of == self.number - 1
