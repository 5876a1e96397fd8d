"""`HookedModel`: a transformers model whose attention Headwater reads and edits, without touching its weights.

The model runs through its own code; attention alone goes through `lens/hooks.py`. Logits, records and generation see
whatever edits are on in the caller's context, and in no other.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from headwater.kernels.operator import AttentionMap
from headwater.lens import hooks, positions, tokens
from headwater.lens.edits import Edit, Prepared
from headwater.lens.errors import EditError, ModelError, PromptError
from headwater.lens.estimate import Estimate, estimate
from headwater.lens.heads import Layers
from headwater.lens.record import DEFAULT_STATISTICS, Record, Recorder
from headwater.lens.tokens import Tokens


class HookedModel:
    """A model that is open. Make it with `headwater.load`.

    `hf` is the transformers model, `layers` the layers that have attention; `n_heads` counts query heads. `context` is
    the longest prompt it can run (None: no limit known). `has_lm_head` says whether `model(...)` has logits to give.
    """

    def __init__(
        self, hf: Any, tokenizer: Any, modules: Mapping[nn.Module, int], name: str, revision: str, causal: bool,
        n_kv_heads: int, d_head: int,
    ) -> None:  # fmt: skip
        config = hf.config.get_text_config()
        self.hf = hf
        self.tokenizer = tokenizer
        self.name = name
        self.revision = revision
        self.causal = causal
        self.layers = sorted(modules.values())
        self.n_layers = len(self.layers)
        self.n_heads = int(config.num_attention_heads)
        self.n_kv_heads = n_kv_heads
        self.d_head = d_head
        self.d_model = int(config.hidden_size)
        self.vocab = int(hf.get_input_embeddings().num_embeddings)
        self.context: int | None = getattr(config, "max_position_embeddings", None)
        self.has_lm_head = hf.get_output_embeddings() is not None
        self.key = hooks.claim(modules)
        self._modules = {layer: module for module, layer in modules.items()}

    def __repr__(self) -> str:
        return (
            f"HookedModel({self.name!r}, {type(self.hf).__name__}, {self.n_layers} layers × {self.n_heads} heads, "
            f"d_model {self.d_model})"
        )

    @property
    def device(self) -> torch.device:
        return self.hf.get_input_embeddings().weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.hf.get_input_embeddings().weight.dtype

    def attention_module(self, layer: int) -> nn.Module:
        """The transformers module of one layer's attention."""
        if layer not in self._modules:
            raise ModelError(f"no attention in layer {layer}; the model has layers {self.layers}")
        return self._modules[layer]

    # --- prompts

    def to_tokens(self, given: Any, attention_mask: Any = None, side: str = "right") -> Tokens:
        """Texts or ids as checked `Tokens` (ids int64 and mask bool, both [batch, position])."""
        found = tokens.to_tokens(given, self.tokenizer, attention_mask, side)  # type: ignore[arg-type]
        tokens.check(found, self.vocab, self.context)
        return Tokens(
            found.ids.masked_fill(~found.mask & ((found.ids < 0) | (found.ids >= self.vocab)), 0), found.mask
        )

    def to_strings(self, ids: Tensor | Iterable[int]) -> list[str]:
        """One string per token id; `#id` where there is no tokenizer."""
        numbers = [int(i) for i in ids]
        if self.tokenizer is None:
            return [f"#{i}" for i in numbers]
        return [self.tokenizer.decode([i], clean_up_tokenization_spaces=False) for i in numbers]

    def unknown_words(self, texts: str | Iterable[str]) -> list[str]:
        """The pieces of the texts that the tokenizer reads as its unknown token, each once, in their order."""
        unknown = getattr(self.tokenizer, "unk_token_id", None)
        if unknown is None or not getattr(self.tokenizer, "is_fast", False):
            return []
        found: dict[str, None] = {}
        for text in [texts] if isinstance(texts, str) else texts:
            read = self.tokenizer(text, return_offsets_mapping=True)
            for token, (begin, end) in zip(read["input_ids"], read["offset_mapping"], strict=True):
                if token == unknown and end > begin:
                    found[text[begin:end]] = None
        return list(found)

    # --- running

    def __call__(self, given: Any, attention_mask: Any = None, *, grad: bool = False) -> Tensor:
        """Logits [batch, position, vocab]. No gradients unless `grad`, or a gate that carries one, asks for them."""
        if not self.has_lm_head:
            raise ModelError(
                f"{self.name} has no language head, so it gives no logits; use model.embeddings(...)"
            )
        return self._forward(self.to_tokens(given, attention_mask), grad).logits

    def embeddings(self, given: Any, attention_mask: Any = None, *, grad: bool = False) -> Tensor:
        """Last hidden state [batch, position, d_model], also of models without a language head."""
        found = self.to_tokens(given, attention_mask)
        if not self.has_lm_head:
            return self._forward(found, grad).last_hidden_state
        return self._forward(found, grad, output_hidden_states=True).hidden_states[-1]

    def loss(self, given: Any, attention_mask: Any = None, *, grad: bool = False) -> Tensor:
        """Mean next-token loss of each example, [batch], in nats, over its real tokens; causal models only."""
        found = self.to_tokens(given, attention_mask)
        if not self.causal:
            raise ModelError(
                f"{self.name} reads in both directions, so it has no next-token loss; give a loss= of your own"
            )
        if int(found.mask.sum(-1).min()) < 2:
            raise PromptError("a next-token loss needs at least two tokens in every example")
        return next_token_loss(self(found, grad=grad), found)

    def _forward(self, given: Tokens, grad: bool = False, **more: Any) -> Any:
        if self.hf.training:
            raise ModelError(
                f"{self.name} is in training mode, where dropout makes attention random; call model.hf.eval()"
            )
        self._check_edits(given)
        inputs = self._inputs(given)
        wants_grad = grad or ((gates := hooks.current_gates(self.key)) is not None and gates.requires_grad)
        with torch.enable_grad() if wants_grad else torch.no_grad():
            return self.hf(**inputs, **more)

    def _inputs(self, given: Tokens) -> dict[str, Tensor]:
        """Keyword arguments of the model; positions are given where padding stands to the left."""
        inputs = {"input_ids": given.ids.to(self.device)}
        if not given.mask.all():
            inputs["attention_mask"] = given.mask.long().to(self.device)
            if not given.mask[:, 0].all() and "position_ids" in inspect.signature(self.hf.forward).parameters:
                inputs["position_ids"] = (given.mask.long().cumsum(-1) - 1).clamp_min(0).to(self.device)
        if "use_cache" in inspect.signature(self.hf.forward).parameters:
            inputs["use_cache"] = False  # type: ignore[assignment]
        return inputs

    def _check_edits(self, given: Tokens, more: int = 0) -> None:
        """Refuse an edit that names a position which no row of the prompt has."""
        longest = int(given.mask.sum(-1).max()) + more
        for prepared in hooks.active(self.key):
            assert isinstance(prepared, Prepared)
            for named in prepared.edit.named_positions():
                if wrong := positions.beyond(positions.check(named, "positions"), longest):
                    raise EditError(
                        f"{type(prepared.edit).__name__}: no position {wrong[0]} in a prompt of {longest} tokens; "
                        f"positions go from 0 to {longest - 1}, or from -1 back to {-longest}"
                    )

    def generate(
        self, given: Any, max_new_tokens: int = 20, attention_mask: Any = None, **options: Any
    ) -> Any:
        """Greedy continuation with a key–value cache, edits on: text for a text, texts for texts, ids for ids.

        What comes back holds the prompt too. `options` go to transformers' own `generate`.
        """
        if not self.causal or not self.has_lm_head:
            raise ModelError(f"{self.name} is not a causal language model and can not continue a text")
        if max_new_tokens < 1:
            raise PromptError(f"max_new_tokens must be at least 1; got {max_new_tokens}")
        found = tokens.to_tokens(given, self.tokenizer, attention_mask, side="left")
        tokens.check(found, self.vocab, self.context, max_new_tokens)
        self._check_edits(found, more=max_new_tokens)
        if self.hf.training:
            raise ModelError(
                f"{self.name} is in training mode, where dropout makes attention random; call model.hf.eval()"
            )
        settings = {"do_sample": False, "max_new_tokens": max_new_tokens} | options
        if getattr(self.hf.generation_config, "pad_token_id", None) is None:
            settings.setdefault("pad_token_id", _pad_id(self.tokenizer))
        with torch.no_grad():
            ids = self.hf.generate(
                input_ids=found.ids.to(self.device),
                attention_mask=found.mask.long().to(self.device),
                **settings,
            )
        if not _is_text(given):
            return ids
        texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        return texts[0] if isinstance(given, str) else texts

    # --- looking inside

    def record(
        self, given: Any, attention_mask: Any = None, *, statistics: Iterable[str] = DEFAULT_STATISTICS,
        layers: Layers = "all", keep: Iterable[str] = ("qk",), groups: Mapping[str, Any] | None = None,
    ) -> Record:  # fmt: skip
        """Run once and keep what defines every attention map, with exact statistics, in linear memory.

        `statistics` are listed in kernels/statistics.py; "mass" needs `groups`, names of key positions. `keep` is
        ("qk",), ("qkv",) or () for statistics alone. Under `model.edit` the record is of the edited weights.
        """
        found = self.to_tokens(given, attention_mask)
        recorder = Recorder(self, found, statistics, layers, keep, groups)
        self._estimate(found, recorder).check()
        with hooks.listening(recorder):
            self._forward(found)
        return recorder.finish()

    def estimate(
        self, given: Any, attention_mask: Any = None, *, statistics: Iterable[str] = DEFAULT_STATISTICS,
        layers: Layers = "all", keep: Iterable[str] = ("qk",), groups: Mapping[str, Any] | None = None,
    ) -> Estimate:  # fmt: skip
        """Bytes that `record` with the same settings would keep, without running the model."""
        found = self.to_tokens(given, attention_mask)
        return self._estimate(found, Recorder(self, found, statistics, layers, keep, groups))

    def _estimate(self, found: Tokens, recorder: Recorder) -> Estimate:
        return estimate(self, found.ids.shape, recorder)

    def head_outputs(self, given: Any, attention_mask: Any = None, *, edited: bool = True) -> Tensor:
        """z of every head before the output projection, [batch, layer, head, position, d_value].

        `edited=False` runs the model as it is, whatever edits are on.
        """
        found = self.to_tokens(given, attention_mask)
        outputs = _Outputs(self.key)
        with hooks.listening(outputs), contextlib.nullcontext() if edited else hooks.unedited(self.key):
            self._forward(found)
        return torch.stack([outputs.by_layer[layer] for layer in self.layers], 1)

    # --- changing

    def edit(self, *edits: Edit) -> contextlib.AbstractContextManager[None]:
        """`with model.edit(…):` — what runs inside sees these edits, in this thread or task alone. Blocks nest."""
        for given in edits:
            if not isinstance(given, Edit):
                raise EditError(
                    f"model.edit takes edits such as hw.ScaleHeads({{'2.3': 0.0}}); got {given!r}"
                )
        prepared = [given.prepare(self) for given in edits]
        return hooks.editing(self.key, prepared)

    @property
    def edits(self) -> tuple[Edit, ...]:
        """The edits that are on in this context."""
        return tuple(p.edit for p in hooks.active(self.key) if isinstance(p, Prepared))

    def gated(self, gates: Tensor) -> contextlib.AbstractContextManager[None]:
        """`with model.gated(gates):` — every head's output times `gates` [batch|1, layer, head]; gradients flow.

        Gates [batch|1, layer, head, position] act at each position by itself.
        """
        if gates.dim() not in (3, 4) or gates.shape[1:3] != (self.n_layers, self.n_heads):
            raise EditError(
                f"gates must be [batch or 1, {self.n_layers} layers, {self.n_heads} heads], and may have one more "
                f"axis for positions; got {list(gates.shape)}"
            )
        return hooks.gated(self.key, gates)

    def using(self, backend: str) -> contextlib.AbstractContextManager[None]:
        """`with model.using("blocked"):` — run attention on the backend of that name, never on another."""
        return hooks.using(backend)


class _Outputs:
    """Listener that keeps z of every layer."""

    def __init__(self, model: object) -> None:
        self.model = model
        self.statistics: tuple[str, ...] = ()
        self.by_layer: dict[int, Tensor] = {}

    def take(self, layer: int, map: AttentionMap, value: Tensor, output: Tensor) -> None:
        self.by_layer[layer] = output.detach()


def next_token_loss(logits: Tensor, found: Tokens) -> Tensor:
    """Mean cross-entropy of each next real token, [batch], in nats."""
    mask = (found.mask[:, 1:] & found.mask[:, :-1]).to(logits.device)
    targets = found.ids[:, 1:].to(logits.device)
    losses = nn.functional.cross_entropy(logits[:, :-1].float().transpose(1, 2), targets, reduction="none")
    return (losses * mask).sum(-1) / mask.sum(-1)


def _is_text(given: Any) -> bool:
    return isinstance(given, str) or (isinstance(given, list | tuple) and isinstance(given[0], str))


def _pad_id(tokenizer: Any) -> int:
    ids = (getattr(tokenizer, "pad_token_id", None), getattr(tokenizer, "eos_token_id", None))
    return next((i for i in ids if i is not None), 0)
