"""Generation with a key–value cache: with edits, a callback per token, and one record of the whole text.

transformers' own `generate` chooses the tokens, so without edits the text is the same. `generate` never runs the model
on the last token it chose; with a record one more step does, so that the record covers all of the returned text.
"""

from __future__ import annotations

import contextlib
import inspect
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from headwater.lens.attention import context
from headwater.lens.errors import ModelError, PromptError, RecordError, nearest
from headwater.lens.examples.inputs import as_inputs, written_form
from headwater.lens.models import inputs, residual_stream
from headwater.lens.models.opened import Opened
from headwater.lens.models.signature import names
from headwater.lens.naming.heads import Layers
from headwater.lens.naming.texts import is_single, is_text
from headwater.lens.naming.tokens import Tokens, pad_id
from headwater.lens.records import destination, plan
from headwater.lens.records.generation_recorder import GenerationRecorder
from headwater.lens.records.memory import estimate
from headwater.lens.records.record import Record
from headwater.lens.records.recorder import Recorder
from headwater.lens.running import branches, padding
from headwater.lens.running.branches import Branch
from headwater.lens.running.forward import check_ready
from headwater.lens.running.generation_settings import check as check_settings, told_in_a_line

OnToken = Callable[[Any], object]


class Generated(NamedTuple):
    """The result of `generate(…, record=True)`: the text or ids as without it, and the record of the whole text."""

    output: Any
    record: Record


class Wanted(NamedTuple):
    """What the record of a generation should hold: the settings of `HookedModel.record`."""

    statistics: Iterable[str]
    layers: Layers
    keep: Iterable[str]
    groups: plan.Groups
    keep_on: destination.KeepOn
    path: str | Path | None


def generate(
    model: Opened, given: Any, attention_mask: Any, max_new_tokens: int, wanted: Wanted | None,
    on_token: OnToken | None, against: Branch | None, put_on: branches.PutOn, options: dict[str, Any],
) -> Any:  # fmt: skip
    """`HookedModel.generate`."""
    main = next(iter(model.parts.values()))
    if not main.causal or not model.has_lm_head:
        raise ModelError(
            f"{model.name} is not a causal language model and can not continue a text; "
            "load a model with a language head"
        )
    if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int) or max_new_tokens < 1:
        raise PromptError(f"max_new_tokens is a whole number of at least 1; got {max_new_tokens!r}")
    if on_token is not None and not callable(on_token):
        raise PromptError(f"on_token is a function of each new piece of text; got {on_token!r}")
    known = names(model.hf)
    _refuse_unknown(model, options, known)
    read = {name: options.pop(name) for name in list(options) if name in known}
    begins = options.pop("prepend_bos", None)
    found = _prompt(model, given, attention_mask, read, begins, max_new_tokens)
    contrast = None
    if against is not None:
        branches.refuse_unknown(against, options)
        _refuse_beams(model, options)
        if against.prompt is None:
            other = _prompt(model, given, attention_mask, {**read, **against.inputs}, begins, max_new_tokens)
        else:
            other = _prompt(model, against.prompt, None, dict(against.inputs), begins, max_new_tokens)
        if len(other) != len(found):
            raise PromptError(f"the branch has {len(other)} prompts for {len(found)}; give one for each")
        contrast = branches.Contrast(model, against, other, put_on, max_new_tokens)
    given = written_form(model, given)
    if "inputs_embeds" in found.more:
        raise PromptError(
            "generate continues tokens; inputs_embeds have no ids: give token ids, or call model(…) for the next logits"
        )
    check_ready(model, found, max_new_tokens)
    check_settings(model, len(found), options)
    settings = {"do_sample": False, "max_new_tokens": max_new_tokens} | options
    if getattr(model.hf.generation_config, "pad_token_id", None) is None:
        settings.setdefault("pad_token_id", pad_id(model.tokenizer, model.vocab))
    listener = _Tokens(model, settings, on_token, is_text(given), is_single(given))
    if on_token is not None or wanted is not None:
        _refuse_beams(model, settings)
        settings["streamer"] = listener
    if _moves(model, found) or (contrast is not None and _moves(model, contrast.tokens)):
        if on_token is not None or wanted is not None:
            raise PromptError(
                f"{model.name} can not generate behind padding, which changes what it gives; record and on_token take "
                "texts of equal length, or one at a time"
            )
        return _written(model, given, _row_by_row(model, found, settings, contrast))
    with _joined(contrast, settings) as joined:
        if wanted is None:
            return _written(model, given, _made(model, found, joined))
        ids, record = _recorded(model, found, joined, max_new_tokens, wanted, listener)
        return Generated(_written(model, given, ids), record)


def _prompt(
    model: Opened, given: Any, attention_mask: Any, more: dict[str, Any], begins: bool | None, following: int
) -> Tokens:
    """The checked inputs of a prompt that `following` tokens at most will stand behind."""
    examples = as_inputs(model, given, attention_mask, more, "left", begins, generating=True)
    return inputs.read(
        model, examples.given, examples.mask, "left", examples.more, following, examples.prepend_bos
    )


def _joined(
    contrast: branches.Contrast | None, settings: dict[str, Any], row: int | None = None
) -> contextlib.AbstractContextManager[dict[str, Any]]:
    """The settings of a run, with its branch where there is one."""
    return contextlib.nullcontext(settings) if contrast is None else contrast.joined(settings, row)


def _refuse_unknown(model: Opened, options: Mapping[str, Any], inputs_known: list[str]) -> None:
    """PromptError for an option that neither the model nor transformers' `generate` knows."""
    config = model.hf.generation_config
    known = {
        "prepend_bos",
        *inputs_known,
        *config.to_dict(),
        *inspect.signature(model.hf.generate).parameters,
    }
    known |= {*inspect.signature(model.hf.forward).parameters, "cache_position"}
    for name in options:
        if name not in known and not hasattr(config, name):
            raise PromptError(f"generate has no option {name!r}: {nearest(name, sorted(known))}")


def _moves(model: Opened, found: Tokens) -> bool:
    """Whether some rows are padded where that changes what the model generates: new tokens stand behind a row."""
    padded = {which: mask for which, mask in padding.masks(model, found).items() if not mask.all()}
    if "encoder" in padded:
        sides = [
            side for side, column in (("left", 0), ("right", -1)) if not padded["encoder"][:, column].all()
        ]
        if any(("encoder", side) in model.moved_by_padding for side in sides):
            return True
    main = padded.get("decoder" if model.is_encoder_decoder else "text")
    if main is None:
        return False
    which = "decoder" if model.is_encoder_decoder else "text"
    return (which, "left") in model.moved_by_padding or not main[:, -1].all()


def _row_by_row(
    model: Opened, found: Tokens, settings: dict[str, Any], contrast: branches.Contrast | None
) -> Tensor:
    """What every row gives alone, [row, position]: prompts behind padding, and padding behind shorter answers."""
    filler = settings.get("pad_token_id", getattr(model.hf.generation_config, "pad_token_id", None)) or 0
    made: list[Tensor] = []
    for n in range(len(found)):
        one = padding.without(model, found.rows([n]))
        with _joined(contrast, settings, n) as joined:
            ids = _made(model, one, joined)
        if not isinstance(ids, Tensor):
            raise PromptError(
                f"{model.name} generates these texts one by one, and return_dict_in_generate takes one text"
            )
        made.append(torch.nn.functional.pad(ids, (found.shape[1] - one.shape[1], 0), value=filler))
    longest = max(ids.shape[1] for ids in made)
    return torch.cat(
        [torch.nn.functional.pad(ids, (0, longest - ids.shape[1]), value=filler) for ids in made]
    )


def _recorded(
    model: Opened, found: Tokens, settings: dict[str, Any], more: int, wanted: Wanted, listener: _Tokens
) -> tuple[Tensor, Record]:  # fmt: skip
    _refuse_unrecordable(model, settings)
    groups: Any = [wanted.groups] if isinstance(wanted.groups, str) else wanted.groups
    if groups is not None:
        named = groups if isinstance(groups, Mapping) else {name: name for name in groups}
        groups = {str(n): () if isinstance(g, str) and g == "generated" else g for n, g in named.items()}
    main = next(iter(model.parts))
    recorders = plan.recorders(model, found, wanted.statistics, wanted.layers, wanted.keep, groups)
    recorder: Recorder = recorders[main]
    if recorder.keeps_mixers:
        raise RecordError(
            "keep='mixers' needs one run over the whole text, and generation goes token by token; generate first and "
            "record the finished text"
        )
    longest = found.ids.shape[1] + more
    cost = estimate(recorder, longest)
    folder = None
    if wanted.keep_on == "disk":
        folder = (
            Path(wanted.path).absolute().parent if wanted.path is not None else Path(tempfile.gettempdir())
        )
    with contextlib.ExitStack() as stack:
        kept = stack.enter_context(destination.keeping({main: recorder}, wanted.keep_on, wanted.path, cost))
        growing = listener.growing = stack.enter_context(
            contextlib.closing(GenerationRecorder(recorder, longest, folder))
        )
        with contextlib.ExitStack() as running:
            running.enter_context(context.listening(growing))
            if recorder.keeps_residuals:
                running.enter_context(residual_stream.listening(model, growing.take_residual))
            ids = _run(model, found, settings)
        growing.finish()
        whole = found.changed(growing.ids, growing.valid)
        return ids, kept.finish(plan.finish(model, whole, {main: recorder}), main)


@torch.no_grad()
def _made(model: Opened, found: Tokens, settings: Mapping[str, Any]) -> Any:
    """What transformers' `generate` gives, with the ids of the prompt as they came, at padding too."""
    with told_in_a_line(model, getattr(settings.get("streamer"), "raised", [])):
        out = model.hf.generate(**inputs.arguments(model, found, generating=True), **settings)
    ids = out if isinstance(out, Tensor) else out.sequences
    if not model.is_encoder_decoder and len(ids) == len(found):
        ids[:, : found.shape[1]] = found.ids.to(ids.device)
    return out


@torch.no_grad()
def _run(model: Opened, found: Tokens, settings: dict[str, Any]) -> Tensor:
    """Generate, then run the model on the last token, with the cache."""
    if getattr(model.hf.config.get_text_config(), "num_kv_shared_layers", 0):
        # Gemma 4 runs layers without keys of their own for the positions alone whose logits are asked for
        settings = {"logits_to_keep": 0, **settings}
    out = _made(model, found, {**settings, "return_dict_in_generate": True})
    if getattr(out, "past_key_values", None) is None:
        raise RecordError("generation left no cache, which record=True needs; do not set use_cache=False")
    ids = out.sequences
    later = torch.ones(len(ids), ids.shape[1] - found.mask.shape[1], dtype=torch.long)
    mask = torch.cat([found.mask.long().cpu(), later], 1).to(ids.device)
    last: dict[str, Any] = {"input_ids": ids[:, -1:], "attention_mask": mask, "use_cache": True}
    if "position_ids" in inspect.signature(model.hf.forward).parameters:
        last["position_ids"] = mask.sum(-1, keepdim=True) - 1
        if inputs.places_images(
            model.hf, found
        ):  # text after an image counts on from the largest image position
            last["position_ids"] = last["position_ids"] + model.hf.base_model.rope_deltas
    model.hf(**last, past_key_values=out.past_key_values)
    return ids


class _Tokens(BaseStreamer):
    """A transformers streamer: notes which rows have ended, and passes each token to the recorder and to `on_token`."""

    growing: GenerationRecorder | None = None

    def __init__(
        self, model: Opened, settings: dict[str, Any], tell: OnToken | None, text: bool, single: bool
    ) -> None:
        ends = settings.get("eos_token_id", getattr(model.hf.generation_config, "eos_token_id", None))
        self._ends = torch.tensor([ends] if isinstance(ends, int) else list(ends or []), dtype=torch.long)
        self._tokenizer = model.tokenizer if text else None
        self._tell = tell
        self._single = single
        self._live: Tensor | None = None
        self._written: list[list[int]] = []
        self.raised: list[Exception] = []  # by `tell`

    def put(self, value: Tensor) -> None:
        if self._live is None:  # transformers passes the prompt first
            self._live = torch.ones(len(value), dtype=torch.bool)
            self._written = [[] for _ in value]
            return
        chosen = value.cpu().reshape(-1)
        if self.growing is not None:
            self.growing.chosen(chosen, self._live)
        live = self._live
        self._live = live & ~torch.isin(chosen, self._ends)
        if self._tell is not None:
            new = chosen if self._tokenizer is None else self._pieces(chosen, live)
            try:
                self._tell(new)
            except Exception as error:
                self.raised.append(error)
                raise

    def _pieces(self, chosen: Tensor, live: Tensor) -> str | list[str]:
        """The text that each token adds to its row; a character made of several tokens comes with the last of them."""
        assert self._tokenizer is not None
        pieces = []
        for row, (token, goes_on) in enumerate(zip(chosen.tolist(), live.tolist(), strict=True)):
            before = self._tokenizer.decode(self._written[row], skip_special_tokens=True)
            if goes_on:
                self._written[row].append(token)
            after = self._tokenizer.decode(self._written[row], skip_special_tokens=True)
            pieces.append(after[len(before) :])
        return pieces[0] if self._single else pieces

    def end(self) -> None:
        """Nothing is buffered."""


def _refuse_beams(model: Opened, settings: dict[str, Any]) -> None:
    for name in ("num_beams", "num_return_sequences"):
        count = settings.get(name, getattr(model.hf.generation_config, name, None)) or 1
        if count > 1:
            raise PromptError(
                f"{name}={count} follows several texts at once; record, on_token and against take {name}=1"
            )


def _refuse_unrecordable(model: Opened, settings: dict[str, Any]) -> None:
    if model.is_encoder_decoder or model.read_only:
        kind = "an encoder–decoder model" if model.is_encoder_decoder else "read-only"
        raise RecordError(
            f"{model.name} is {kind}; generate without record=True, then record the whole text with model.record(…)"
        )
    if settings.get("past_key_values") is not None:
        raise RecordError("record=True reads the whole text, so it takes no past_key_values; leave them out")
    kind = settings.get(
        "cache_implementation", getattr(model.hf.generation_config, "cache_implementation", None)
    )
    if kind not in (None, "dynamic"):
        raise RecordError(
            f"cache_implementation={kind!r} has no place for the last token; record=True takes 'dynamic'"
        )


def _written(model: Opened, given: Any, ids: Tensor) -> Any:
    if not is_text(given):
        return ids
    texts = model.tokenizer.batch_decode(ids, skip_special_tokens=True)
    return texts[0] if is_single(given) else texts
