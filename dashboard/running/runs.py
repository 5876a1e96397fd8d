"""Runs A and B: what a model says of an input, as it is and with edits, another text or another model.

Results are kept by their content (model, input, part, edits), so two sessions that ask the same thing share the answer
and no session sees another's edits. A page never waits in a run: within `later` one that is not there yet is `Pending`,
and a job makes it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import psutil
import torch
from streamlit.runtime.scriptrunner import get_script_run_ctx

import headwater as hw
from headwater.analyses._prompts.examples import outputs_of
from headwater.dashboard.running import jobs
from headwater.dashboard.running.inputs import Input, given, given_to_b
from headwater.dashboard.running.jobs import Lane, quick
from headwater.dashboard.running.models import called, is_record, record, record_key, resident
from headwater.dashboard.state.kept import Kept
from headwater.dashboard.state.state import State
from headwater.lens.edits.patterns import named_files
from headwater.lens.errors import EditError, HeadwaterError, ModelError
from headwater.lens.experiments import edits_on_parts
from headwater.lens.models.signature import compares, markers
from headwater.lens.running.last_states import BLOCK, LastStates, last_states
from headwater.lens.running.losses import next_token_loss, next_token_losses

STATISTICS = ("lse", "entropy", "max", "self", "previous", "first", "distance", "received", "visible")
NAMES = ("run A", "run B")
QUICK = 3e10  # operations of about a second on two cores
LETTERS, PATCHES = 3, 600  # letters of a token and patches of a picture, about
kept = Kept(psutil.virtual_memory().total // 8, least=2)  # A and B of one session, whatever they take
_later: ContextVar[bool] = ContextVar("headwater_runs_later", default=False)


@dataclass(frozen=True)
class Run:
    """What a run of a model gives.

    `logits` are those of the next token or of the classes, float64; empty for a model that has neither, and then
    `hidden` holds its last hidden states [position, d_model]. `similarity` is that of a text and its picture, for two
    towers. `loss` is the mean of the text in nats, `losses` [position - 1] those of its tokens, NaN for one that has
    none; both are None where there are none. `part` is the part whose record this is; `""` is the main one.
    """

    name: str
    key: tuple[str, ...]  # of the input: equal keys, equal inputs
    example: Any
    edits: str
    part: str
    record: hw.Record
    parts: tuple[str, ...]
    logits: np.ndarray
    labels: tuple[str, ...]
    loss: float | None
    losses: np.ndarray | None
    hidden: np.ndarray
    similarity: float | None
    position: int | None  # of the token whose prediction the logits are; None for classes

    @property
    def identity(self) -> tuple[Any, ...]:
        """What tells its results from those of other runs."""
        return self.name, self.key, self.part, self.edits

    @property
    def of_record(self) -> bool:
        """Whether it is a record from a file, whose model is not there."""
        return self.key[0] == "record" and len(self.key) == 4

    @property
    def queries(self) -> list[str]:
        return self.record.query_axis.strings[0]

    @property
    def keys(self) -> list[str]:
        return self.record.key_axis.strings[0]

    @property
    def square(self) -> bool:
        """Whether queries and keys are the same tokens."""
        return self.queries == self.keys

    @property
    def causal(self) -> bool:
        """Whether no query sees a key behind it."""
        return bool(self.record.causal) and self.square

    @property
    def layers(self) -> list[int]:
        return list(self.record.layers)

    @property
    def n_heads(self) -> int:
        return self.record.n_heads

    def label(self, number: int) -> str:
        """The token or class that a logit is of."""
        if self.labels:
            return self.labels[number]
        return resident(self.name).to_strings(torch.as_tensor([number]))[0]

    def log_probabilities(self) -> np.ndarray:
        return self.logits - np.logaddexp.reduce(self.logits)


@dataclass(frozen=True)
class Asked:
    """A run that is wanted: the key by which it is kept, what makes it, its name, and its model and lane as a job."""

    key: tuple[Any, ...]
    work: Callable[[], Run]
    what: str
    model: str
    lane: Lane


class Pending(BaseException):
    """A page asks for a run that is not there yet; no error that a page may catch."""

    def __init__(self, asked: Asked) -> None:
        self.asked = asked


class Failed(HeadwaterError):
    """The run of this key could not be made."""

    def __init__(self, why: str, key: tuple[Any, ...]) -> None:
        super().__init__(why)
        self.key = key


@contextmanager
def later() -> Iterator[None]:
    """Inside, the script of a page is told that a run is `Pending`, and does not wait for it."""
    token = _later.set(True)
    try:
        yield
    finally:
        _later.reset(token)


def a(state: State) -> Run:
    """The model on the input as it is, or a record."""
    if is_record(state.model):
        return _of_record(state.model, state.part)
    return _run(state.model, given(state, resident(state.model)), state.part, "[]", "run A")


def b(state: State) -> Run | None:
    """The same with the edits, the other text and the other model of the state; None where there is none of them."""
    if not state.has_b():
        return None
    name = state.b_model or state.model
    if is_record(name):
        if state.applied() or state.b_text is not None:
            raise EditError(
                f"{called(name)} is the record of a run, which neither edits nor another text change"
            )
        return _of_record(name, state.part)
    what = given_to_b(state, name, resident(name))
    return _run(name, what, state.part, json.dumps(state.applied(), sort_keys=True), "run B")


def shown(state: State) -> Run:
    """The run that pages show: B where that is chosen and there is one."""
    other = b(state) if state.shown == "b" else None
    return a(state) if other is None else other


def model_of(state: State, run: Run | None = None) -> hw.HookedModel:
    """The model of a run with the state's part, for analyses; enter `editing(run)` around them."""
    model = resident(state.model if run is None else run.name)
    part = state.part if run is None else run.part
    return model.part(part) if part and part != model.part_name else model


def editing(run: Run) -> AbstractContextManager[None]:
    """Inside, the edits of a run are on, each on its part of the model."""
    if run.of_record:
        return nullcontext()
    return edits_on_parts.editing(resident(run.name), edits_of(json.loads(run.edits)))


def keys_of(state: State, part: str) -> list[str]:
    """The keys of a part in run A, which edits of that part name."""
    return a(replace(state, part=part, notices=[])).keys


def edits_of(edits: Sequence[dict]) -> list[edits_on_parts.PartEdit]:
    """Edits and their parts from data, such as an address, which may not name files: it could open them, or tell which
    there are."""
    for edit in edits:
        if named_files(edit):
            raise EditError(
                f"{edit.get('edit')} names the file of a record, which the dashboard does not open; run it with "
                "headwater record --edits"
            )
    return [edits_on_parts.read(edit) for edit in edits]


def _of_record(name: str, part: str) -> Run:
    """A record as a run that gives no answer; of several texts the first."""
    found, none = record(name), np.empty(0)
    shown = found.part(part) if part else found
    parts = ("", *found.parts)
    return Run(name, record_key(name), "", "[]", part, shown, parts, none, (), None, None, none, None, None)


def _run(name: str, what: Input, part: str, edits: str, called: str) -> Run:
    key = ("run", name, what.key, part, edits)
    if (found := kept.get(key)) is not None:
        return found
    if (why := jobs.fault(key)) is not None:
        raise Failed(why, key)
    if _later.get() and get_script_run_ctx(suppress_warning=True) is not None:  # a job is no script
        called += f" of the part {part}" if part else ""
        lane: Lane = "run" if _operations(name, what) > QUICK else "short run"
        raise Pending(Asked(key, lambda: _made(name, part, edits, what), called, name, lane))
    with quick(name):
        if (found := kept.get(key)) is None:  # another session ran it meanwhile
            found = _made(name, part, edits, what)
            kept.put(key, found)
    return found


def _operations(name: str, what: Input) -> float:
    """About how many operations a run takes, from the letters of its text."""
    model = resident(name)
    tokens = len(what.text) / LETTERS + (PATCHES if what.key[1] else 0)
    weights = sum(each.numel() for each in model.hf.parameters())
    return 2 * weights * tokens + 4 * tokens**2 * model.d_model * model.n_layers


def _made(name: str, part: str, edits: str, what: Input) -> Run:
    model = resident(name)
    with torch.no_grad(), edits_on_parts.editing(model, edits_of(json.loads(edits))):
        tokens = model.to_tokens(what.example)
        with last_states(model) as said:
            record = _recorded(model, tokens)
        parts = {model.part_name: record, **record.parts}
        for other in model.parts:  # those that the record of the main part does not bring along
            if other == part and other not in parts:
                parts[other] = _recorded(model.part(other), tokens)
        if part and part not in parts:
            raise ModelError(f"{model.name} has no part {part!r}; its parts are {', '.join(model.parts)}")
        logits, labels, loss, losses, hidden, similarity, position = _said(model, tokens, said)
    return Run(
        name, what.key, what.example, edits, part, parts[part or model.part_name], tuple(model.parts), logits,
        labels, loss, losses, hidden, similarity, position,
    )  # fmt: skip


def _said(model: hw.HookedModel, tokens: Any, said: LastStates) -> tuple:
    """Logits, labels, loss, losses, hidden states, similarity and position of one run."""
    none = np.empty(0)
    if compares(model.hf):
        return none, (), None, None, none, float(outputs_of(model)(tokens).reshape(-1)[0]), None
    if model.has_lm_head:
        place = _asked(model, tokens)
        if place is None:
            return none, (), None, None, _hidden(model, tokens), None, None
        long = tokens.ids.shape[1] > BLOCK  # of a short text the logits are bit for bit those of model(…)
        if long and model.causal and said.logits is not None and (found := said.losses(tokens)) is not None:
            losses = _known(model, tokens, *found)
            loss = None if losses is None else float(np.nanmean(losses))
            return said.logits[0].double().numpy(), (), loss, losses, none, None, place
        out = model(tokens)
        loss = losses = None
        if model.causal and out.shape[1] > 1:
            plain = not (model.is_encoder_decoder or "token_type_ids" in tokens.more)
            skipped = markers(model.hf).values()
            loss = float((next_token_loss(out, tokens, skipped) if plain else model.loss(tokens))[0])
            if out.shape[1] == tokens.ids.shape[1]:
                losses = _known(model, tokens, *next_token_losses(out, tokens))
        return out[0, place].double().numpy(), (), loss, losses, none, None, place
    if model.classes:
        out = model(tokens).double().numpy()
        if out.ndim == 2:
            return out[0], tuple(model.classes), None, None, none, None, None
    return none, (), None, None, _hidden(model, tokens), None, None


def _known(model: hw.HookedModel, tokens: Any, losses: torch.Tensor, real: torch.Tensor) -> np.ndarray | None:
    """The losses of one text, NaN where a token has none, such as one that stands for a picture; None without any."""
    found, known, targets = losses[0].double().numpy().copy(), real[0], tokens.ids[0, 1:]
    for marker in markers(model.hf).values():
        known = known & (targets != marker)
    found[~known.numpy()] = np.nan
    return found if np.isfinite(found).any() else None


def _asked(model: hw.HookedModel, tokens: Any) -> int | None:
    """The position whose prediction is looked at: the last, or in a masked language model the mask's."""
    ids = tokens.ids[0]
    if model.causal:
        return len(ids) - 1
    mask = getattr(model.tokenizer, "mask_token_id", None)
    found = (ids == mask).nonzero()[:, 0].tolist() if mask is not None else []
    return found[0] if found else None


def _hidden(model: hw.HookedModel, tokens: Any) -> np.ndarray:
    return model.embeddings(tokens)[0].double().numpy()


def _recorded(model: hw.HookedModel, tokens: Any) -> hw.Record:
    """The record, with the exact maps of layers without softmax attention where these can be read."""
    # of patches the record takes those statistics that mean something there
    chosen: dict[str, Any] = {} if model.part_name == "vision" else {"statistics": STATISTICS}
    if model.mixers:
        try:
            return model.record(tokens, keep=("qk", "mixers"), **chosen)
        except ModelError:  # of a kind without a map, which the analyses that need one then say
            pass
    return model.record(tokens, **chosen)


def pattern(
    run: Run, layer: int, head: int, queries: slice | None = None, keys: slice | None = None
) -> np.ndarray:
    """Exact weights of one map or of a window of it, [query, key]."""
    return run.record.pattern(layer, head, queries=queries, keys=keys)[0].numpy()


def rows(run: Run, layer: int, head: int, queries: slice, keys: slice) -> Iterator[tuple[slice, np.ndarray]]:
    """The same window as blocks of rows, for maps too large to hold; slices count from the window's first query."""
    for where, weights in run.record.map(layer).row_blocks(heads=[head]):
        first, last = max(where.start, queries.start), min(where.stop, queries.stop)
        if first < last:
            block = weights[0, 0, first - where.start : last - where.start, keys]
            yield slice(first - queries.start, last - queries.start), block.numpy()
