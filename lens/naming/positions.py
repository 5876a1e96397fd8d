"""The ways to write positions: by number, or by a name that is looked up while the model runs.

Numbers: an int, a slice, a range, "all", or a list of these. Position 0 is the first real token of a row, so padding on
the left does not shift the count. Negative numbers count from the last real token: -1 is the last token of the prompt
and, in generation, the token that is being read.

Names, which `edits/named_positions.py` looks up:

- "token:Mary": every token whose text is " Mary" or "Mary";
- "special", "image", "generated", "text": a token group: the tokenizer's special tokens in the prompt, image tokens,
  tokens after the prompt, all others. `model.edit(..., groups={"subject": [3, 4]})` adds groups;
- "sinks:act", "sinks:share:0.5", "sinks:massive": the sinks of each head (massive: of each layer) by a rule of
  `records/sinks.py`, found on the prompt in an unedited run before the edited one.

All of these are plain data that JSON can hold, and a list may mix them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from headwater.kernels.tiles.mask import Mask
from headwater.lens.errors import EditError

Positions = str | int | slice | Iterable["str | int"]
GROUPS = ("image", "special", "generated", "text")
RULES = ("share", "act", "massive")
UNNAMED = {  # rules of `find_sinks` that edits do not support, with the advice that the error gives
    "gu": "is the rule share on a text's first 64 tokens; write 'sinks:share'",
    "spectral": "takes up to 200 passes over every map before the run; find them once with find_sinks(record, "
    "rule='spectral') and give their positions",
}


def check(positions: Positions, what: str) -> str | int | slice | tuple:
    """The positions as an int, str, slice or tuple; EditError where they are none of these. `what` names the field."""
    if isinstance(positions, str):
        _check_name(positions, what)
        return positions
    if isinstance(positions, slice):
        try:
            positions.indices(1)
        except (TypeError, ValueError) as error:
            raise EditError(f"{what}: a slice is of whole numbers; got {positions!r} ({error})") from None
        return positions
    if isinstance(positions, range):
        return tuple(positions)
    if isinstance(positions, int | np.integer) and not isinstance(positions, bool):
        return int(positions)
    if isinstance(positions, bool) or not isinstance(positions, Iterable) or isinstance(positions, dict):
        raise EditError(f"{what} must be positions (whole numbers) or a name; got {positions!r}")
    found = positions.tolist() if isinstance(positions, Tensor | np.ndarray) else list(positions)
    if not isinstance(found, list) or not all(_is_one(p) for p in found):
        raise EditError(f"{what} must be positions (whole numbers) or names; got {positions!r}")
    for name in found:
        if isinstance(name, str):
            _check_name(name, what)
    return tuple(p if isinstance(p, str) else int(p) for p in found)


def _is_one(given: Any) -> bool:
    return isinstance(given, str | int | np.integer) and not isinstance(given, bool)


def _check_name(name: str, what: str) -> None:
    """Refuse a malformed name: an empty one, an unknown rule, a threshold that is not a number."""
    kind, colon, rest = name.partition(":")
    if not colon:
        if not name.replace("_", "").replace("-", "").isalnum():
            raise EditError(
                f"{what} are 'all', a position, a slice, a list, or a name such as 'token:Mary', 'image', 'sinks:act'; "
                f"got {name!r}"
            )
        return
    if kind == "token" and rest:
        return
    rule, _, threshold = rest.partition(":")
    if kind == "sinks" and rule in RULES:
        if not threshold or _is_number(threshold):
            return
        raise EditError(f"{what}: the threshold in {name!r} is not a number above 0; write 'sinks:share:0.3'")
    if kind == "sinks" and rule in UNNAMED:
        raise EditError(f"{what}: {name!r} {UNNAMED[rule]}")
    if kind == "sinks":
        raise EditError(f"{what}: sinks are found by the rules {', '.join(RULES)}; got {name!r}")
    raise EditError(
        f"{what}: {name!r} is no name; write 'token:Mary', a group such as 'image', or 'sinks:act'"
    )


def _is_number(text: str) -> bool:
    try:
        return 0 < float(text) < float("inf")
    except ValueError:
        return False


def parts(positions: Any) -> tuple:
    """Checked positions as a tuple of ints, slices and names."""
    return tuple(positions) if isinstance(positions, tuple | list) else (positions,)


def named(positions: Any) -> list[str]:
    """The names among checked positions, without "all"."""
    return [p for p in parts(positions) if isinstance(p, str) and p != "all"]


def beyond(positions: Any, length: int) -> list[int]:
    """The numbers that are out of range for a prompt of `length` tokens."""
    return [p for p in parts(positions) if isinstance(p, int) and (p >= length or p < -length)]


def of_row(positions: Any, length: int) -> list[int]:
    """Checked numeric positions as indices into a row of `length` real tokens; numbers out of range are dropped."""
    found: list[int] = []
    for part in parts(positions):
        if isinstance(part, str):
            if part != "all":
                raise EditError(f"{part!r} is a name; give positions by number here")
            return list(range(length))
        if isinstance(part, slice):
            found += range(*part.indices(length))
        elif -length <= part < length:
            found.append(part % length)
    return found


def select(positions: Any, mask: Mask, axis: str) -> Tensor:
    """Numeric positions as rows (`axis="query"`) or columns ("key") of a layer's map, bool [batch|1, query or key]."""
    offset, count = (mask.query_offset, mask.queries) if axis == "query" else (mask.key_offset, mask.keys)
    start, stop = mask.real(axis)
    picked = torch.zeros(len(start), count, dtype=torch.bool)
    for row, (first, last) in enumerate(zip(start.tolist(), stop.tolist(), strict=True)):
        columns = torch.tensor(of_row(positions, last - first), dtype=torch.long) + first - offset
        picked[row, columns[(columns >= 0) & (columns < count)]] = True
    return picked
