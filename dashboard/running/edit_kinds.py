"""The kinds of edit that the dashboard makes: their names, what each asks for, and which number is its strength.

What an edit asks for is read off its signature; a table gives the limits of its numbers and better words.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from headwater.kernels.rules.normaliser import PARAMETERS
from headwater.lens.edits import EDITS

Asks = Literal[
    "heads", "layers", "layer", "tokens", "number", "whole", "choice", "flag", "texts", "data", "direction"
]
COMMON = ("Redistribute", "Knockout", "ScaleHeads", "AblateHeads", "TowardIdentity", "Temperature")
NOT_HERE = {
    "FreezeAttention": "it reads the weights of another run from the file of a record: headwater record --edits",
    "InjectPattern": "it takes a pattern [query, key], a tensor that is given in Python",
    "OffsetHeads": "it takes a vector for each head; fit_offsets learns them in Python",
    "AtSteps": "it limits an edit to steps of a diffusion model, and none of those opens here",
}
WORDS = {
    "Redistribute": ("Redistribute attention", "Takes weight from some tokens and hands it to others."),
    "Knockout": ("Knock out attention", "Some tokens can no longer look at others."),
    "ScaleHeads": ("Scale heads", "Makes the output of heads stronger or weaker."),
    "AblateHeads": ("Ablate heads", "Puts zero, a mean or another text's output in the place of heads' outputs."),
    "TowardIdentity": ("Toward the token itself", "Mixes each row with the token's own place."),
    "Temperature": ("Sharpen or spread attention", "Multiplies the scores before the softmax."),
    "TowardUniform": ("Toward an even spread", "Mixes each row with an even spread over what it sees."),
    "BiasKeys": ("Add to the scores of tokens", "Scores on some tokens grow by a number before the softmax."),
    "Emphasise": ("Emphasise tokens", "Scores on some tokens grow in proportion to their size (PAINT)."),
    "MoveAttention": ("Move attention", "Moves a share of the weight on some tokens to others."),
    "ScaleWeights": ("Scale weights", "Multiplies weights on some tokens and renormalises nothing."),
    "RedistributeMassive": ("Redistribute massive tokens", "Takes weight from tokens with massive activations."),
    "MaskPairs": ("Hide pairs by a rule", "A query sees only the keys that a rule shows."),
    "StreamingWindow": ("Streaming window", "A query sees the first tokens and the latest ones."),
    "HeavyHitters": ("Heavy hitters", "Evicts keys as a cache of heavy hitters and recent tokens does."),
    "GroupedAttention": ("Groups of tokens", "A query sees its own group of tokens, and the first ones."),
    "PositionInvariant": ("Documents without order", "Reads adjacent documents as if they had no order."),
    "PruneTokens": ("Prune tokens", "Leaves only the tokens with the largest scores behind a layer."),
    "Normaliser": ("Another normaliser", "Replaces the softmax of whole layers."),
    "HeadMix": ("Mix heads", "Moves each head's weights toward the mean of all heads of its layer."),
    "EditResidual": ("Edit the residual stream", "Adds a direction to the stream, or takes it out."),
    "EditMLP": ("Edit an MLP", "Adds a direction to the output of a layer's MLP, or takes it out."),
}  # fmt: skip
LABELS = {
    "heads": "Heads",
    "layers": "Layers",
    "keys": "Tokens that are looked at",
    "queries": "Rows of these tokens",
    "to": "Hand it to",
    "source": "Take it from",
    "positions": "Tokens",
    "image": "Tokens of the image",
    "keep": "Share that stays there",
    "amount": "Amount",
    "tau": "Multiply scores by",
    "bias": "Add to the scores",
    "factor": "Multiply by",
    "how": "How",
}
# (low, high, step, default) of the numbers, by edit and field, or by field alone
NUMBERS: dict[tuple[str, str], tuple[float | int, float | int, float | int, float | int]] = {
    ("Redistribute", "keep"): (0.0, 1.0, 0.05, 0.4),
    ("RedistributeMassive", "keep"): (0.0, 1.0, 0.05, 0.6),
    ("RedistributeMassive", "tau"): (1.0, 100.0, 1.0, 20.0),
    ("RedistributeMassive", "most"): (0.0, 1.0, 0.05, 0.5),
    ("RedistributeMassive", "least"): (0.0, 1.0, 0.05, 0.2),
    ("ScaleHeads", "factor"): (0.0, 3.0, 0.05, 0.5),
    ("ScaleWeights", "factor"): (0.0, 3.0, 0.05, 0.5),
    ("MoveAttention", "amount"): (0.0, 1.0, 0.05, 1.0),
    ("TowardIdentity", "amount"): (0.0, 1.0, 0.05, 0.5),
    ("TowardUniform", "amount"): (0.0, 1.0, 0.05, 0.5),
    ("Emphasise", "amount"): (0.0, 2.0, 0.05, 0.5),
    ("HeadMix", "amount"): (0.0, 1.0, 0.05, 0.5),
    ("Temperature", "tau"): (0.0, 5.0, 0.1, 2.0),
    ("BiasKeys", "bias"): (-10.0, 10.0, 0.25, -2.0),
    ("EditResidual", "amount"): (-20.0, 20.0, 0.5, 4.0),
    ("EditMLP", "amount"): (-20.0, 20.0, 0.5, 4.0),
    ("StreamingWindow", "sinks"): (0, 100_000, 1, 4),
    ("StreamingWindow", "window"): (1, 1_000_000, 1, 8),
    ("HeavyHitters", "heavy"): (0, 100_000, 1, 2),
    ("HeavyHitters", "recent"): (1, 100_000, 1, 4),
    ("GroupedAttention", "size"): (1, 100_000, 1, 4),
    ("GroupedAttention", "shift"): (0, 100_000, 1, 0),
    ("GroupedAttention", "sinks"): (0, 100_000, 1, 0),
    ("PruneTokens", "share"): (0.0, 1.0, 0.05, 0.5),
    ("PruneTokens", "recycle"): (0, 1000, 1, 0),
}
STRENGTH = {
    "Redistribute": "keep",
    "RedistributeMassive": "keep",
    "ScaleHeads": "factor",
    "ScaleWeights": "factor",
    "MoveAttention": "amount",
    "TowardIdentity": "amount",
    "TowardUniform": "amount",
    "Emphasise": "amount",
    "Temperature": "tau",
    "BiasKeys": "bias",
}
SIGNED = ("products", "cog")  # normalisers whose weights may be negative: no shares, of which the pages tell
LEFT_OUT = ("rows", "where", "prior", "mix", "seed", "layers", "adaptive")
EXAMPLES = '{"kind": "near", "grid": [4, 4], "reach": 1}'


@dataclass(frozen=True)
class Ask:
    """One thing that an edit asks for. `low`, `high` and `step` are of numbers; `needed`: it can not be left out."""

    name: str
    label: str
    kind: Asks
    default: Any = None
    low: float | int | None = None
    high: float | int | None = None
    step: float | int | None = None
    options: tuple[str, ...] = ()
    needed: bool = False


@dataclass(frozen=True)
class EditKind:
    """`meaning` is one sentence."""

    name: str
    title: str
    meaning: str
    asks: tuple[Ask, ...]


@cache
def kinds() -> dict[str, EditKind]:
    """Every edit that can be made here, the common ones first."""
    names = [*COMMON, *sorted(name for name in EDITS if name not in COMMON and name not in NOT_HERE)]
    return {name: EditKind(name, *_words(name), _asks(name)) for name in names}


def _words(name: str) -> tuple[str, str]:
    return WORDS.get(name) or (name, (EDITS[name].__doc__ or "").strip().partition("\n")[0].replace("`", ""))


def number_of(kind: str, field: str) -> tuple[float | int, float | int, float | int, float | int]:
    return NUMBERS.get((kind, field), (-1000.0, 1000.0, 0.1, 1.0))


def _number(kind: str, field: str) -> Ask:
    low, high, step, default = number_of(kind, field)
    asks: Asks = "whole" if isinstance(low, int) else "number"
    return Ask(field, LABELS.get(field, field.capitalize()), asks, default, low, high, step)


def _asks(kind: str) -> tuple[Ask, ...]:
    if kind in SPECIAL:
        return SPECIAL[kind]
    found = []
    for each in dataclasses.fields(EDITS[kind]):
        if each.name not in LEFT_OUT:
            found.append(_ask(kind, each))
    return tuple(found)


def _ask(kind: str, each: dataclasses.Field) -> Ask:
    """What a field of an edit asks for, from its type."""
    label, needed = LABELS.get(each.name, each.name.capitalize()), each.default is dataclasses.MISSING
    default = None if needed else each.default
    of_type = str(each.type)
    if each.name == "heads":
        return Ask("heads", label, "heads", needed=needed)
    if of_type.startswith("Positions"):
        return Ask(each.name, label, "tokens", default, needed=needed)
    if (kind, each.name) in NUMBERS or of_type.startswith(("float", "int")):
        return _number(kind, each.name)
    if of_type == "bool":
        return Ask(each.name, label, "flag", bool(default))
    return Ask(each.name, label, "data", default, needed=needed)


_HEADS = Ask("heads", "Heads", "heads")
_NEEDED_HEADS = dataclasses.replace(_HEADS, needed=True)
_LAYERS = Ask("layers", "Layers", "layers")


def _stream(kind: str, *more: Ask) -> tuple[Ask, ...]:
    return (
        Ask("layer", "Layer", "layer"),
        Ask("how", "How", "choice", "add", options=("add", "project_out", "replace")),
        Ask("vector", "Direction", "direction"),
        _number(kind, "amount"),
        *more,
        Ask("positions", "Tokens", "tokens", "all"),
    )


# those whose fields are not what a person is asked for
SPECIAL: Mapping[str, tuple[Ask, ...]] = {
    "ScaleHeads": (_NEEDED_HEADS, _number("ScaleHeads", "factor")),
    "AblateHeads": (
        _NEEDED_HEADS,
        Ask("ablation", "In their place", "choice", "zero", options=("zero", "mean", "resample")),
        Ask("examples", "Texts whose outputs are taken, one in a line", "texts"),
    ),
    "HeadMix": (_number("HeadMix", "amount"), _LAYERS),
    "Normaliser": (
        Ask("name", "Normaliser", "choice", "softmax1", options=tuple(n for n in PARAMETERS if n not in SIGNED)),
        _LAYERS,
    ),
    "PruneTokens": (
        Ask("layer", "Behind layer", "layer"),
        _number("PruneTokens", "share"),
        Ask("score", "Score", "choice", "attention", options=("attention", "values", "flow", "random")),
        Ask("positions", "Of the tokens", "tokens", "image"),
    ),
    "MaskPairs": (Ask("rule", f"Rule, such as {EXAMPLES}", "data", EXAMPLES, needed=True), _HEADS),
    "PositionInvariant": (
        Ask("documents", "Documents [first, end), such as [[1, 4], [4, 8]]", "data", needed=True),
    ),
    "RedistributeMassive": (
        Ask("dimensions", "Massive dimensions, such as [12, 40]", "data", needed=True),
        _number("RedistributeMassive", "keep"),
        _number("RedistributeMassive", "tau"),
        Ask("image", "Tokens of the image", "tokens", "image"),
        _HEADS,
    ),
    "EditResidual": _stream(
        "EditResidual", Ask("place", "Place", "choice", "post", options=("pre", "mid", "post"))
    ),
    "EditMLP": _stream("EditMLP"),
}  # fmt: skip


@dataclass(frozen=True)
class Strength:
    """The number of an edit that says how much it does."""

    field: str
    value: float
    low: float
    high: float
    step: float


def strength(edit: Mapping[str, Any]) -> Strength | None:
    """The strength of an edit as data; None where it has none, or several."""
    kind = str(edit.get("edit"))
    field = STRENGTH.get(kind)
    if field is None:
        return None
    if kind == "ScaleHeads":
        factors = edit.get("factors")
        values = set(factors.values()) if isinstance(factors, dict) else set()
        value = values.pop() if len(values) == 1 else None
    else:
        value = edit.get(field)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    low, high, step, _ = number_of(kind, field)
    return Strength(field, float(value), min(float(low), value), max(float(high), value), float(step))


def with_strength(edit: Mapping[str, Any], value: float) -> dict[str, Any]:
    """The same edit with another strength."""
    if edit["edit"] == "ScaleHeads":
        return {**edit, "factors": dict.fromkeys(edit["factors"], value)}
    return {**edit, STRENGTH[edit["edit"]]: value}


def positions_in(edit: Mapping[str, Any]) -> list[int]:
    """The positions that an edit names by number."""
    found: list[int] = []
    for name in ("keys", "queries", "to", "source", "positions"):
        given = edit.get(name)
        given = given if isinstance(given, list) else [given]
        found += [place for place in given if isinstance(place, int) and not isinstance(place, bool)]
    return sorted(set(found))
