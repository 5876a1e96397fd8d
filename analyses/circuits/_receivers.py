"""The receivers of path patching: queries, keys or values of heads, the stream at a layer, or the logits."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from headwater.analyses._runs.replace_activations import Parts, Per, expanded, per_head
from headwater.lens.errors import AnalysisError
from headwater.lens.model import HookedModel

PART = re.compile(r"\s*(\d{1,5})\.(\d{1,5})\.([qkv])\s*")
STREAM = re.compile(r"\s*residual\.(\d{1,5})\s*")


@dataclass(frozen=True)
class Receivers:
    """`kind` "parts": `parts[layer]` are (q, k or v; head) of that layer; "residual": the stream entering `layer`.

    `shared` says that heads of k and v are key–value heads. `layer` is the first layer that receives, one past the last
    layer for "logits".
    """

    kind: Literal["parts", "residual", "logits"]
    layer: int
    parts: Mapping[int, tuple[tuple[str, int], ...]]
    heads: int
    shared: bool

    @classmethod
    def of(cls, model: HookedModel, given: str | Sequence[str], per: Per | None) -> Receivers:
        """From "logits", "residual.3" or one or more of "5.1.q", "5.1.k", "5.1.v"."""
        names = [name for name in (given.split(",") if isinstance(given, str) else given) if name.strip()]
        if [name.strip() for name in names] == ["logits"]:
            return cls("logits", model.blocks[-1] + 1, {}, model.n_heads, False)
        if len(names) == 1 and (found := STREAM.fullmatch(names[0])):
            layer = int(found[1])
            if layer not in model.layers:
                raise AnalysisError(f"no layer {layer}; {model.name} has layers {model.layers}")
            return cls("residual", layer, {}, model.n_heads, False)
        if not names or not all(PART.fullmatch(name) for name in names):
            raise AnalysisError(
                f"receivers={given!r} can not be read; give 'logits', 'residual.3', or queries, keys and values of "
                "heads such as '5.1.k, 6.0.q'"
            )
        return cls._heads(model, names, per)

    @classmethod
    def _heads(cls, model: HookedModel, names: Sequence[str], per: Per | None) -> Receivers:
        wanted: dict[int, list[tuple[str, int]]] = {}
        for found in filter(None, map(PART.fullmatch, names)):
            layer, head, part = int(found[1]), int(found[2]), found[3]
            one = per_head(model, part, None if part == "q" else per)
            count = model.n_kv_heads if part != "q" and not one else model.n_heads
            if layer not in model.layers or head >= count:
                kind = "key–value heads" if count != model.n_heads else "heads"
                raise AnalysisError(
                    f"no {found[0].strip()}; {model.name} has layers {model.layers} and {kind} 0 to {count - 1}"
                )
            wanted.setdefault(layer, []).append((part, head))
        parts = {layer: tuple(wanted[layer]) for layer in sorted(wanted)}
        return cls("parts", min(parts), parts, model.n_heads, per == "kv_head")

    @property
    def last(self) -> int:
        """The last layer with a receiver; senders come before it."""
        return max(self.parts, default=self.layer)

    def wide(self, layer: int, found: Parts) -> Parts:
        """Keys and values per query head, where the receivers of a layer are query heads' copies."""
        part_of = {part for part, _ in self.parts.get(layer, ())}
        if self.shared or not part_of & {"k", "v"}:
            return found
        return {name: expanded(tensor, self.heads) for name, tensor in found.items()}

    def given(self, layer: int, found: Parts, values: Parts) -> Parts:
        """q, k and v of a layer with the receivers' values in their places."""
        found = {name: tensor.clone() for name, tensor in self.wide(layer, found).items()}
        values = self.wide(layer, values)
        for part, head in self.parts[layer]:
            found[part][:, head] = values[part][:, head]
        return found
