"""What a session looks at, kept in the address so that a link or a reload shows the same thing.

The address is read once, when a session starts; from then on the session writes it. Model, layer, head, prompt and
edits travel in it, the page is its path. A prompt too long for an address is kept in this process under its hash,
and only the hash is written; after a restart such a link says that its prompt is gone. Values that do not fit are
replaced, and every replacement is told.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import streamlit as st

from headwater.lens.trained.registry import TRAINED

DEFAULT_PROMPT = "When Mary and John went to the store , John gave a drink to"
WRITTEN_PROMPT = "When Mary and John went to the store, John gave a drink to"  # as people write it
LONGEST_PROMPT = 400
LONGEST_EDITS = 1500
KEPT_PROMPTS = 32
KEY = "headwater"

_prompts: OrderedDict[str, str] = OrderedDict()
_prompts_lock = threading.Lock()


@dataclass
class State:
    model: str
    prompt: str = DEFAULT_PROMPT
    layer: int = 0
    head: int = 0
    token: int | None = None  # the token clicked last; None is the last of the prompt
    edits: list[dict] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)

    def choose_head(self, layer: int, head: int) -> None:
        self.layer, self.head = layer, head

    def fit(self, layers: Sequence[int], n_heads: int) -> None:
        """Bring layer and head into the model's range and say so."""
        if self.layer not in layers:
            nearest = min(layers, key=lambda layer: abs(layer - self.layer))
            self.notices.append(
                f"Layer {self.layer} does not exist: {self.model} has {layers[0]} to {layers[-1]}. Showing {nearest}."
            )
            self.layer = nearest
        if not 0 <= self.head < n_heads:
            nearest = min(max(self.head, 0), n_heads - 1)
            self.notices.append(
                f"Head {self.head} does not exist: {self.model} has 0 to {n_heads - 1} in a layer. Showing {nearest}."
            )
            self.head = nearest


def first_prompt(model: str) -> str:
    """The prompt that a model is shown on before another is typed."""
    return WRITTEN_PROMPT if model in TRAINED else DEFAULT_PROMPT


def current(models: Sequence[str]) -> State:
    """The state of this session, begun from the address on its first run."""
    if KEY not in st.session_state:
        st.session_state[KEY] = from_address(st.query_params.to_dict(), models)
    return st.session_state[KEY]


def from_address(parameters: Mapping[str, str], models: Sequence[str]) -> State:
    state = State(model=models[0])
    wanted = parameters.get("model", state.model)
    if wanted in models:
        state.model = wanted
    else:
        state.notices.append(
            f"Model {wanted!r} is not offered here; showing {state.model}. Start with it: headwater dashboard MODEL."
        )
    state.prompt = first_prompt(state.model)
    state.layer = _whole("layer", parameters, state)
    state.head = _whole("head", parameters, state)
    if "prompt" in parameters:
        state.prompt = parameters["prompt"]
    elif "prompt_id" in parameters:
        kept = recalled(parameters["prompt_id"])
        if kept is None:
            state.notices.append(
                "The prompt of this link was too long for the address and is no longer held; showing another."
            )
        else:
            state.prompt = kept
    if "edits" in parameters:
        state.edits = _edits(parameters["edits"], state)
    return state


def to_address(state: State) -> dict[str, str]:
    parameters = {"model": state.model, "layer": str(state.layer), "head": str(state.head)}
    if len(state.prompt) <= LONGEST_PROMPT:
        parameters["prompt"] = state.prompt
    else:
        parameters["prompt_id"] = kept(state.prompt)
    edits = json.dumps(state.edits, separators=(",", ":"))
    if state.edits and len(edits) <= LONGEST_EDITS:
        parameters["edits"] = edits
    return parameters


def write_address(state: State) -> None:
    wanted = to_address(state)
    if st.query_params.to_dict() != wanted:
        st.query_params.from_dict(wanted)


def kept(prompt: str) -> str:
    """Hold a long prompt in this process and give the name it is held under."""
    name = hashlib.sha256(prompt.encode("utf-8", "replace")).hexdigest()[:32]
    with _prompts_lock:
        _prompts[name] = prompt
        _prompts.move_to_end(name)
        while len(_prompts) > KEPT_PROMPTS:
            _prompts.popitem(last=False)
    return name


def recalled(name: str) -> str | None:
    with _prompts_lock:
        return _prompts.get(name)


def _whole(name: str, parameters: Mapping[str, str], state: State) -> int:
    text = parameters.get(name, "0")
    if text.isascii() and text.isdigit() and len(text) < 7:
        return int(text)
    state.notices.append(
        f"The address gives {name}={text[:20]!r}, which is no whole number from 0 up; showing 0."
    )
    return 0


def _edits(text: str, state: State) -> list[dict]:
    """Edits as they stand in an address; each is checked as an edit, and none is taken if one is wrong."""
    from headwater.dashboard.runs import edits_of
    from headwater.lens.errors import EditError, HeadwaterError
    from headwater.lens.files import parse_json

    try:
        if len(text) > 4 * LONGEST_EDITS:
            raise ValueError("too long")
        edits = parse_json(text, "the text", EditError)
        if not isinstance(edits, list) or not all(isinstance(edit, dict) for edit in edits):
            raise ValueError("not a list of edits")
        edits_of(edits)
    except (ValueError, TypeError, KeyError, RecursionError, HeadwaterError) as error:
        state.notices.append(
            f"The edits of the address can not be read ({str(error)[:120]}); starting without edits."
        )
        return []
    return edits
