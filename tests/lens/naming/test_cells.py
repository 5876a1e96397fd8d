"""A cell of a CSV file runs nothing, whatever a text begins with.

Seen to fail without the apostrophe.
"""

from __future__ import annotations

import pytest

from headwater.lens.naming.cells import FORMULA, inert


@pytest.mark.parametrize("sign", FORMULA)
def test_a_text_that_is_a_formula_is_inert(sign: str) -> None:
    assert inert(f"{sign}1") == f"'{sign}1"
    assert not inert(f"{sign}\x001").startswith(FORMULA)
    assert "\x00" not in inert(f"a\x00{sign}")


def test_other_cells_stay() -> None:
    assert [inert(each) for each in ("a=1", -1, None, 0.5)] == ["a=1", -1, None, 0.5]
