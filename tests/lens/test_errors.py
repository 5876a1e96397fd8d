"""Every error of Headwater is one that the command line prints, and a slip is answered with what is near.

Mutations seen to fail: all names listed where some are near; blank lines taken for what an error says.
"""

from __future__ import annotations

import pytest

from headwater.lens import errors


def test_what_is_near_is_named_and_all_where_nothing_is():
    known = ["entropy", "received", "distance"]
    assert errors.nearest("recieved", known) == "did you mean 'received'?"
    assert errors.nearest("zzz", known) == "there are entropy, received, distance"
    assert errors.nearest("zzz", []) == "there are none"


@pytest.mark.parametrize("name", [name for name in vars(errors) if name.endswith("Error")])
def test_every_error_is_the_users_to_mend(name):
    assert issubclass(getattr(errors, name), errors.HeadwaterError)


def test_a_message_is_one_line_of_bounded_length_with_its_end():
    told = str(errors.ModelError("first\n" + "x" * 5000 + "; give another"))
    assert len(told) == errors.LONGEST
    assert told.startswith("first x")
    assert told.endswith("; give another")
    assert str(errors.EditError("short")) == "short"


@pytest.mark.parametrize("nothing", ["", "\n", " \n\t\n"])
def test_an_error_that_says_nothing_is_told_by_its_class(nothing):
    assert errors.first_line(ValueError(nothing)) == errors.named_line(ValueError(nothing)) == "ValueError"
    told = ValueError(nothing + "\n first\nsecond")
    assert (errors.first_line(told), errors.named_line(told)) == ("first", "ValueError: first")
