"""`State`: all that a session looks at, in one object, which the address of the page holds.

Whatever a page can be set to is a field or a setting of the state, so that leaving a page loses nothing and a link
shows what its sender saw.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Shown = Literal["a", "b", "difference"]
Setting = str | int | float | bool | list


@dataclass
class State:
    """`answer` and `wrong` are ids of tokens or classes, None: the likeliest and the next likeliest.

    `query` and `key` are positions, None: the last and none. Run A is the model on the input as it is; run B has the
    edits, another text (`b_text`) or another model (`b_model`). An edit acts on its `"part"`, without one on the part
    that answers; one with `"off": True` is listed and not applied.
    """

    model: str
    text: str = ""
    decoder: str = ""  # what an encoder–decoder writes
    picture: str = ""  # a picture of the workspace, or "sample:" and the name of one
    part: str = ""  # "" is the part that answers
    answer: int | None = None
    wrong: int | None = None
    kind: str = ""  # of the measure; "" is the first that fits the model
    layer: int = 0
    head: int = 0
    query: int | None = None
    key: int | None = None
    edits: list[dict] = field(default_factory=list)
    b_text: str | None = None
    b_model: str | None = None
    shown: Shown = "a"
    pins: list[str] = field(default_factory=list)  # heads "2.1" and edges "0.0>2.1"
    settings: dict[str, Setting] = field(default_factory=dict)  # of pages: "heads.score"
    notices: list[str] = field(default_factory=list)  # told once

    def get(self, name: str, default: Any = None) -> Any:
        """A field, or with a dot in its name a setting of a page."""
        return self.settings.get(name, default) if "." in name else getattr(self, name)

    def listed(self, name: str) -> list[Any]:
        """A setting that is a list; empty where it is none or something else."""
        found = self.settings.get(name)
        return list(found) if isinstance(found, list) else []

    def put(self, name: str, value: Any) -> None:
        if "." in name:
            self.settings[name] = value
        else:
            setattr(self, name, value)

    def choose_head(self, layer: int, head: int) -> None:
        self.layer, self.head = layer, head

    def pin(self, name: str) -> None:
        """Pin a head or an edge, or take its pin away."""
        if name in self.pins:
            self.pins.remove(name)
        else:
            self.pins.append(name)

    def applied(self) -> list[dict]:
        """The edits that are on, as data that edits are made from."""
        return [{name: value for name, value in edit.items() if name != "off"} for edit in self.edits
                if not edit.get("off")]  # fmt: skip

    def on_part(self, edit: dict) -> dict:
        """An edit of the part that is shown."""
        return {**edit, "part": self.part} if self.part else edit

    def has_b(self) -> bool:
        """Whether run B differs from run A in anything."""
        return bool(self.applied()) or self.b_text is not None or self.b_model is not None

    def new_input(self) -> None:
        """Forget what belongs to the tokens of the last input: the answer, and the chosen tokens."""
        self.answer = self.wrong = self.query = self.key = None

    def fit(self, layers: Sequence[int], n_heads: int, name: str = "") -> None:
        """Bring layer and head into the range of the model, or of the model `name`, and say so."""
        name = name or self.model
        if self.layer not in layers:
            nearest = min(layers, key=lambda layer: abs(layer - self.layer))
            self.notices.append(
                f"Layer {self.layer} does not exist: {name} has {layers[0]} to {layers[-1]}. Showing {nearest}."
            )
            self.layer = nearest
        if not 0 <= self.head < n_heads:
            nearest = min(max(self.head, 0), n_heads - 1)
            self.notices.append(
                f"Head {self.head} does not exist: {name} has 0 to {n_heads - 1} in a layer. Showing {nearest}."
            )
            self.head = nearest
