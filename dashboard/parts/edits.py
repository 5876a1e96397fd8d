"""Edits in words, as a list to read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from headwater.dashboard.figures.labels import cut, visible
from headwater.dashboard.running import runs
from headwater.dashboard.state.state import State
from headwater.lens.errors import HeadwaterError

MOST = 4  # tokens or heads named; more are counted
GROUPS = {
    "image": "image tokens",
    "special": "special tokens",
    "text": "text tokens",
    "generated": "new tokens",
}
RULES = {"act": "far above an even spread", "share": "a large share", "massive": "massive activations"}
ABLATED = {"zero": "zero", "mean": "their mean over other texts", "resample": "their outputs on other texts"}


def told(state: State, edit: Mapping[str, Any]) -> str:
    """What an edit of a state does, as one line, its tokens those of its part."""
    part = str(edit.get("part", ""))
    try:
        tokens = runs.keys_of(state, part)
    except HeadwaterError:  # the model has no such part, which the list says beside it
        tokens = []
    return in_words(edit, tokens)


def in_words(edit: Mapping[str, Any], tokens: Sequence[str]) -> str:
    """What an edit does, as one line: "60 % of what goes to ‹bos› → others, all heads; encoder"."""
    part = f"; {cut(str(edit['part']), 20)}" if edit.get("part") else ""
    return _does(edit, tokens) + part


def _does(edit: Mapping[str, Any], tokens: Sequence[str]) -> str:
    heads = _heads(edit.get("heads", "all"), edit.get("layers", "all"))
    kind = str(edit.get("edit", "edit"))

    def named(field: str) -> str:
        return _tokens(edit.get(field), tokens)

    def number(field: str, default: float = 0.0) -> float:
        value = edit.get(field)
        return float(value) if isinstance(value, int | float) else default

    rows = "" if edit.get("queries", "all") == "all" else f" by {named('queries')}"
    if kind == "ScaleHeads":
        scales = edit.get("factors") or {}
        every = (
            [f"{head} × {factor:g}" for head, factor in scales.items()] if isinstance(scales, dict) else []
        )
        return f"output of {_few(every)}" if every else f"outputs scaled, {heads}"
    found = {
        "Redistribute": lambda: f"{1 - number('keep', 0.4):.0%} of what goes to {named('keys')}{rows} → "
        f"{_to(edit.get('to'), tokens)}",
        "RedistributeMassive": lambda: f"{1 - number('keep', 0.6):.0%} of what goes to massive tokens → the image's "
        "others",
        "Knockout": lambda: f"{named('queries')} can not look at {named('keys')}",
        "TowardIdentity": lambda: f"{number('amount'):.0%} toward the token itself{rows}",
        "TowardUniform": lambda: f"{number('amount'):.0%} toward an even spread{rows}",
        "Temperature": lambda: f"scores × {number('tau', 1):g}",
        "BiasKeys": lambda: f"scores on {named('keys')} {number('bias'):+g}",
        "Emphasise": lambda: f"scores on {named('keys')}{rows} + {number('amount'):g} of their size",
        "MoveAttention": lambda: f"{number('amount', 1):.0%} of what goes to {named('source')}{rows} → "
        f"{_to(edit.get('to'), tokens)}",
        "ScaleWeights": lambda: f"weights on {named('keys')}{rows} × {number('factor', 1):g}, not renormalised",
        "FreezeAttention": lambda: "weights of another run",
        "InjectPattern": lambda: f"{number('amount', 1):.0%} of a given pattern",
        "StreamingWindow": lambda: f"each token sees the first {edit.get('sinks')} and the latest {edit.get('window')}",
        "HeavyHitters": lambda: f"each token sees {edit.get('heavy')} heavy hitters and the latest "
        f"{edit.get('recent')}",
        "GroupedAttention": lambda: f"each token sees its group of {edit.get('size')}"
        + (f" and the first {edit.get('sinks')}" if edit.get("sinks") else ""),
        "MaskPairs": lambda: f"each token sees {_rule(edit.get('rule'))}",
        "HeadMix": lambda: "heads are mixed",
    }  # fmt: skip
    if kind in found:
        return f"{found[kind]()}, {heads}"
    if kind == "AblateHeads":
        how = str(edit.get("ablation", "zero"))
        return f"without {heads} ({ABLATED.get(how, how)} in their place)"
    if kind == "Normaliser":
        return f"{edit.get('name')} in place of softmax, {_heads('all', edit.get('layers', 'all'), 'all layers')}"
    if kind == "PruneTokens":
        left = edit.get("keep")
        kept = (
            [f"{_left(n)} behind layer {at}" for at, n in left.items()] if isinstance(left, Mapping) else []
        )
        return f"of {named('positions')} stay {_few(kept)} (by {edit.get('score', 'attention')})"
    if kind == "PositionInvariant":
        documents = edit.get("documents")
        return f"{len(documents) if isinstance(documents, list) else 'some'} documents without order"
    if kind in ("EditResidual", "EditMLP"):
        of = "MLP output" if kind == "EditMLP" else "residual stream"
        how = {"add": "+ a direction", "project_out": "without a direction", "replace": "= a vector"}
        where = f"{of} of layer {edit.get('layer')}"
        return f"{where} {how.get(str(edit.get('how')), str(edit.get('how')))}, at {named('positions')}"
    if kind == "OffsetHeads":
        offsets = edit.get("offsets")
        return f"output of {_few(list(offsets) if isinstance(offsets, dict) else [])} + a vector"
    if kind == "AtSteps" and isinstance(edit.get("of"), Mapping):
        return f"at steps {edit.get('steps')}: {in_words(edit['of'], tokens)}"
    rest = ", ".join(
        f"{name} {value}"
        for name, value in edit.items()
        if name not in ("edit", "heads", "layers", "off", "part")
    )
    return cut(f"{kind}: {rest}" if rest else kind, 90)


def _left(n: Any) -> str:
    return f"{n:.0%}" if isinstance(n, float) else str(n)


def _rule(rule: Any) -> str:
    if isinstance(rule, Mapping):
        rest = ", ".join(f"{name} {value}" for name, value in rule.items() if name != "kind")
        return cut(f"the pairs of {rule.get('kind')} ({rest})", 60)
    return "the pairs of a mask"


def _tokens(places: Any, tokens: Sequence[str]) -> str:
    if isinstance(places, int) and not isinstance(places, bool):
        places = [places]
    if not isinstance(places, list):
        return "all tokens" if places in (None, "all") else _name(str(places))
    named = [
        f"‹{cut(visible(tokens[place]), 14)}›"
        if isinstance(place, int) and -len(tokens) <= place < len(tokens)
        else _name(str(place))
        for place in places
    ]
    return _few(named)


def _name(name: str) -> str:
    """Positions that are given by name: a group, a word, or the sinks by a rule."""
    kind, _, rest = name.partition(":")
    if kind == "token" and rest:
        return f"every ‹{cut(visible(rest), 14)}›"
    if kind == "sinks":
        rule, _, threshold = rest.partition(":")
        return f"sinks ({RULES.get(rule, rule)}{f', {threshold}' if threshold else ''})"
    return GROUPS.get(name, name)


def _to(to: Any, tokens: Sequence[str]) -> str:
    return _tokens(to, tokens) if isinstance(to, list | int) else _name(str(to or "others"))


def _heads(heads: Any, layers: Any, every: str = "all heads") -> str:
    if isinstance(heads, dict):
        heads = list(heads)
    if isinstance(heads, str) and heads != "all":
        heads = [heads]
    if isinstance(heads, list):
        return ("head " if len(heads) == 1 else "heads ") + _few([str(head) for head in heads])
    if isinstance(layers, int):
        layers = [layers]
    if isinstance(layers, list):
        return ("layer " if len(layers) == 1 else "layers ") + _few([str(layer) for layer in layers])
    return every


def _few(named: list[str]) -> str:
    return (
        ", ".join(named) if len(named) <= MOST else f"{', '.join(named[:MOST])} and {len(named) - MOST} more"
    )
