"""`Names`: looks up the tokens that names of positions mean, such as "token:Mary", while the model runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from headwater.kernels.tiles.mask import Mask
from headwater.lens.errors import EditError, nearest
from headwater.lens.models.axes import TEXTS, axis
from headwater.lens.models.opened import Opened
from headwater.lens.models.parts import Part
from headwater.lens.models.token_groups import groups_of_ids
from headwater.lens.naming import positions
from headwater.lens.naming.tokens import Tokens
from headwater.lens.running.ids import UNKNOWN, current

NO_GROUPS: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True, eq=False)
class Names:
    """The names of positions for one model, with the `groups` of `model.edit(…, groups=…)`."""

    model: Opened
    groups: Mapping[str, Any] = field(default_factory=dict)

    def check(self, given: Any, what: str) -> None:
        """EditError for a name that no prompt of this model can have."""
        for name in positions.named(positions.check(given, what)):
            if name.startswith("sinks:"):
                if name.startswith("sinks:massive") and self._part.crosses:
                    raise EditError(
                        f"{what}: {name!r} is of a stream of tokens, and cross-attention has two; "
                        "use 'sinks:share' or 'sinks:act'"
                    )
                continue
            if name in self.groups:
                self.check(self.groups[name], f"groups: {name}")
            elif not name.startswith("token:") and name not in (*positions.GROUPS, self._part.keys):
                known = [*positions.GROUPS, *self.groups]
                raise EditError(
                    f"{what}: no token group is called {name!r}: {nearest(name, known)}; new ones are given as "
                    f"model.edit(…, groups={{{name!r}: positions}}); got {name!r}"
                )
            elif self._part.keys not in TEXTS and name not in ("special", self._part.keys):
                raise EditError(
                    f"{what}: the part {self._part.name!r} reads no text, so it has no {name!r}; give numbers"
                )
            elif name == "image" and self._part.keys in TEXTS and self.model.image_token is None:
                raise EditError(
                    f"{what}: {self.model.name} has no image tokens, so it has no group 'image'; give numbers"
                )

    def sink_names(self, given: Any) -> list[str]:
        """The "sinks:…" names in the positions and in the groups that they name."""
        found = []
        for name in positions.named(given):
            if name in self.groups:
                found += self.sink_names(positions.check(self.groups[name], "groups"))
            elif name.startswith("sinks:"):
                found.append(name)
        return found

    def missing(self, given: Any, tokens: Tokens) -> str | None:
        """The first name that no row of the prompt has; None if each is there."""
        for name in positions.named(given):
            if name in self.groups:
                found = self.missing(positions.check(self.groups[name], "groups"), tokens)
                if found is not None:
                    return found
            elif not name.startswith("sinks:") and name != "generated" and self._part.keys in TEXTS:
                side = axis(self._part, self._part.queries, tokens)
                if (
                    side is None
                    or not (self._flags(name, side.ids.cpu(), side.ids.shape[1], {}) & side.mask.cpu()).any()
                ):
                    return name
        return None

    def select(self, given: Any, mask: Mask, axis: str, layer: int, head: int = 0) -> Tensor:
        """The positions as rows (`axis="query"`) or columns ("key") of a layer's map, bool [batch|1, query or key].

        Names of sinks mean the sinks of `head`.
        """
        plain = positions.check(given, "positions")
        numbers = tuple(p for p in positions.parts(plain) if p == "all" or not isinstance(p, str))
        picked = positions.select(numbers, mask, axis)
        for name in positions.named(plain):
            if name in self.groups:
                more = self.select(self.groups[name], mask, axis, layer, head)
            else:
                more = self._standing(name, mask, axis, layer, head)
            picked = picked | more
        return picked

    def sinks_of(self, name: str, mask: Mask, layer: int) -> Tensor:
        """The sinks of one layer by a rule, bool [batch, head, prompt position]."""
        run = current(self.model.key)
        if name not in run.sinks:
            raise EditError(
                f"{name!r}: sinks are found when model(…), model.record(…) or model.generate(…) reads the prompt, not "
                "when the transformers model is called by itself"
            )
        if not run.has_its_sinks:
            raise EditError(f"{name!r}: the sinks were found on another prompt; call model(…) for this one")
        return run.sinks[name][:, self.model.layers.index(layer)]

    def _standing(self, name: str, mask: Mask, axis: str, layer: int, head: int) -> Tensor:
        offset, count = (mask.query_offset, mask.queries) if axis == "query" else (mask.key_offset, mask.keys)
        if name.startswith("sinks:"):
            flags = self.sinks_of(name, mask, layer)[:, head]
        elif (self._part.queries if axis == "query" else self._part.keys) not in TEXTS:
            patches = self._part.patches
            whole = (
                mask.queries if axis == "query" else mask.keys
            )  # these parts read all of their tokens at once
            main = torch.ones(whole, dtype=torch.bool) if patches is None else patches.are_patches(whole)
            flags = ~main[None] if name == "special" else main[None]
        elif axis == "key" and self._part.crosses:
            raise EditError(f"{name!r}: keys of cross-attention are named by number or as sinks")
        else:
            run = current(self.model.key)
            if run.ids is None:
                raise EditError(
                    f"{name!r}: the token ids of this call are not known; name positions by number"
                )
            slot = (name, run.ids.shape[1])
            if slot not in run.memory:
                run.memory[slot] = self._flags(name, run.ids, run.prompt, run.memory)
            flags = run.memory[slot]
        flags = torch.nn.functional.pad(flags, (0, max(offset + count - flags.shape[1], 0)))
        flags = flags[:, offset : offset + count]
        start, stop = (edge[:, None] for edge in mask.real(axis))
        place = torch.arange(offset, offset + count)
        return flags & (place >= start) & (place < stop)

    def _flags(self, name: str, ids: Tensor, prompt: int, texts: dict[Any, Any]) -> Tensor:
        """The tokens among ids [batch, position] that a name means, padding included; bool of the same shape."""
        if name.startswith("token:"):
            wanted = name.removeprefix("token:")
            known = [i for i in ids.unique().tolist() if i != UNKNOWN]
            for i in known:
                if ("text", i) not in texts:
                    texts["text", i] = self.model.to_strings([i])[0]
            same = [i for i in known if wanted in (texts["text", i], texts["text", i].strip())]
            return torch.isin(ids, torch.tensor(same, dtype=ids.dtype))
        return groups_of_ids(self.model, ids, torch.ones_like(ids, dtype=torch.bool), prompt)[name]

    @property
    def _part(self) -> Part:
        return self.model.parts[self.model.part_name]
