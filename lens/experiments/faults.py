"""What is wrong with a file that a person wrote, in one line."""

from __future__ import annotations

from collections.abc import Collection

from pydantic import ValidationError

from headwater.lens.errors import nearest


def first_fault(error: ValidationError, whole: str, known: Collection[str]) -> str:
    """The first fault in one line, and how many more there are; `whole` names the file, `known` are its keys."""
    faults = error.errors(include_url=False, include_context=False)
    first = faults[0]
    where = ".".join(map(str, first["loc"])) or whole
    came = repr(first.get("input"))
    came = came if len(came) <= 60 else came[:57] + "…"
    more = f" ({len(faults) - 1} more faults)" if len(faults) > 1 else ""
    if first["type"] == "extra_forbidden":
        return f"{where} is no key of {whole}: {nearest(first['loc'][-1], known)}{more}"
    return f"{where}: {first['msg']}; got {came}{more}"
