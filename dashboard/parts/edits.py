"""Edits in words, as a list to read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from headwater.dashboard.figures.labels import cut, visible

MOST = 4  # tokens or heads named; more are counted


def in_words(edit: dict, tokens: Sequence[str]) -> str:
    """What an edit does, as one line: "60 % of ‹bos› to others, all heads"."""
    heads = _heads(edit.get("heads", "all"), edit.get("layers", "all"))
    kind = edit.get("edit", "edit")
    if kind == "Redistribute":
        share = 1 - float(edit.get("keep", 0))
        taken, to = _tokens(edit.get("keys"), tokens), _to(edit.get("to"), tokens)
        return f"{share:.0%} of what goes to {taken} → {to}, {heads}"
    if kind == "Knockout":
        return f"{_tokens(edit.get('queries'), tokens)} can not look at {_tokens(edit.get('keys'), tokens)}, {heads}"
    if kind == "ScaleHeads":
        scales = edit.get("factors") or {}
        named = (
            [f"{head} × {factor:g}" for head, factor in scales.items()] if isinstance(scales, dict) else []
        )
        return f"output of {_few(named)}" if named else f"outputs scaled, {heads}"
    if kind == "AblateHeads":
        return f"without {heads} ({edit.get('ablation', 'zero')})"
    if kind == "TowardIdentity":
        return f"{float(edit.get('amount', 0)):.0%} toward the token itself, {heads}"
    if kind == "TowardUniform":
        return f"{float(edit.get('amount', 0)):.0%} toward an even spread, {heads}"
    if kind == "Temperature":
        return f"scores × {float(edit.get('tau', 1)):g}, {heads}"
    rest = ", ".join(
        f"{name} {value}" for name, value in edit.items() if name not in ("edit", "heads", "layers", "off")
    )
    return cut(f"{kind}: {rest}" if rest else str(kind), 90)


def _tokens(places: Any, tokens: Sequence[str]) -> str:
    if not isinstance(places, list):
        return "all tokens" if places in (None, "all") else str(places)
    named = [
        f"‹{cut(visible(tokens[place]), 14)}›"
        if isinstance(place, int) and -len(tokens) <= place < len(tokens)
        else str(place)
        for place in places
    ]
    return _few(named)


def _to(to: Any, tokens: Sequence[str]) -> str:
    return _tokens(to, tokens) if isinstance(to, list) else str(to or "others")


def _heads(heads: Any, layers: Any) -> str:
    if isinstance(heads, dict):
        heads = list(heads)
    if isinstance(heads, list):
        return ("head " if len(heads) == 1 else "heads ") + _few([str(head) for head in heads])
    if isinstance(layers, list):
        return f"layers {_few([str(layer) for layer in layers])}"
    return "all heads"


def _few(named: list[str]) -> str:
    return (
        ", ".join(named) if len(named) <= MOST else f"{', '.join(named[:MOST])} and {len(named) - MOST} more"
    )
