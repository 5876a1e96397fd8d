"""The examples in the docstrings of the public names run as pasted, and print what they say.

Seen to fail with a number changed in an example.
"""

from __future__ import annotations

import doctest
import functools
import inspect
from collections.abc import Iterator

import pytest

import headwater as hw
from headwater import analyses
from headwater.kernels.attend import attend
from headwater.lens import recipes

load = functools.cache(hw.load)  # examples change no model, so they may share one
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def public() -> Iterator[tuple[str, object]]:
    """Every function and class that users meet, by the name they meet it under."""
    for name in hw.__all__:
        found = getattr(hw, name)
        if inspect.isclass(found) or inspect.isfunction(found):
            yield f"hw.{name}", found
    for home, names in ((analyses, dir(analyses)), (recipes, vars(recipes))):
        for name in names:
            found = getattr(home, name)
            if inspect.isfunction(found) and not name.startswith("_"):
                yield f"{home.__name__.rpartition('.')[2]}.{name}", found
    yield "kernels.attend", attend


PUBLIC = dict(public())


def examples(name: str) -> list[doctest.Example]:
    return doctest.DocTestParser().get_examples(inspect.getdoc(PUBLIC[name]) or "")


def test_every_public_name_has_an_example() -> None:
    missing = [name for name in PUBLIC if not examples(name)]
    assert not missing, f"without an example in the docstring: {', '.join(missing)}"


@pytest.mark.parametrize("name", [name for name in PUBLIC if examples(name)])
def test_example(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hw, "load", load)
    written: list[str] = []
    test = doctest.DocTest(examples(name), {}, name, None, None, None)
    outcome = doctest.DocTestRunner(optionflags=FLAGS).run(test, out=written.append)
    assert outcome.failed == 0, "".join(written)
