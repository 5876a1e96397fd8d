"""`inert`: a text as a cell of a CSV file that other programs can open safely.

A text that begins with ``=``, ``+``, ``-`` or ``@`` is a formula for spreadsheets; it gets an apostrophe in front.
"""

from __future__ import annotations

from typing import Any

FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")


def inert(value: Any) -> Any:
    """Anything but a text stays as it is.

    >>> inert("=1+1"), inert("a"), inert(-1)
    ("'=1+1", 'a', -1)
    """
    if not isinstance(value, str):
        return value
    value = value.replace("\x00", "␀")
    return "'" + value if value.startswith(FORMULA) else value
