"""`HookedModel`: a transformers model whose attention Headwater reads and edits, without touching its weights.

The model runs through its own code; attention alone goes through `lens/attention/context.py`. Logits, records and
generation see whatever edits are on in the caller's context, and in no other.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from headwater.kernels.maps.attention_map import AttentionMap
from headwater.lens.attention import context
from headwater.lens.edits.base import Edit, Prepared, applied, check_prompt
from headwater.lens.errors import EditError, ModelError, PromptError, nearest
from headwater.lens.models import inputs, read_only as dense
from headwater.lens.models.parts import Part, Patches, axis, embedding, first_position
from headwater.lens.naming import tokens
from headwater.lens.naming.heads import Layers
from headwater.lens.naming.tokens import Tokens
from headwater.lens.records import destination, plan
from headwater.lens.records.memory import Estimate
from headwater.lens.records.record import DEFAULT_STATISTICS, Record
from headwater.lens.running import generation
from headwater.lens.transformer_lens.face import TransformerLens

LOGITS = ("logits", "logits_per_image")


class HookedModel(TransformerLens):
    """A model that is open. Make it with `headwater.load`.

    `hf` is the transformers model, `layers` the layers that have attention; `n_heads` counts query heads. `context` is
    the longest prompt it can run (None: no limit known). `has_lm_head` says whether there are logits over a vocabulary.
    All of these are of the main part where the model has several (parts.py); `part(name)` gives the others.
    `read_only` is the reason where attention can be read but not edited, `unread` the stacks that were not read at all.
    """

    def __init__(
        self, hf: Any, tokenizer: Any, parts: Mapping[str, Part], name: str, revision: str, *,
        unread: tuple[str, ...] = (), read_only: str = "",
    ) -> None:  # fmt: skip
        text = hf.config.get_text_config()
        table = embedding(hf)
        self.hf = hf
        self.tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # a processor holds one
        self.name = name
        self.revision = revision
        self.parts = dict(parts)
        self.unread = unread
        self.read_only = read_only
        self.is_encoder_decoder = bool(getattr(hf.config, "is_encoder_decoder", False))
        self.vocab = int(table.num_embeddings) if table is not None else 0
        self.source_context: int | None = getattr(text, "max_position_embeddings", None)
        self.context: int | None = getattr(text, "max_target_positions", self.source_context)
        if self.context is not None:
            self.context -= first_position(hf)  # these rows of the table stand for no token
        self.has_lm_head = self.vocab > 0 and hf.get_output_embeddings() is not None
        self.image_token = inputs.image_token(hf)
        self.image_tokens = inputs.image_tokens(hf) if "vision" in self.parts else 0
        self._claim()
        self._stand_on(next(iter(self.parts)))

    def _claim(self) -> None:
        """Register the attention modules of every part; cross-attention takes its rows from the decoder's own."""
        tells = next(iter(self.parts)) if any(part.crosses for part in self.parts.values()) else None
        self._keys: dict[str, object] = {}
        for name, part in self.parts.items():
            rows = self._keys.get(tells or "") if part.crosses else None
            self._keys[name] = context.claim(part.modules, rows, name == tells)

    def _stand_on(self, name: str) -> None:
        part = self.parts[name]
        self.part_name = name
        self.causal = part.causal
        self.layers = sorted(part.modules.values())
        self.n_layers = len(self.layers)
        self.n_heads = part.n_heads
        self.n_kv_heads = part.n_kv_heads
        self.d_head = part.d_head
        self.d_model = part.d_model
        self.key = self._keys[name]
        self._modules = {layer: module for module, layer in part.modules.items()}

    def part(self, name: str) -> HookedModel:
        """The same model seen from another of its parts (`model.parts` names them): its layers, heads, edits, records.

        `with model.part("cross").edit(…):` edits cross-attention; `model.part("vision").record(…)` is of the images.
        """
        if name not in self.parts:
            raise ModelError(f"{self.name} has no part {name!r}: {nearest(name, self.parts)}")
        found = object.__new__(type(self))
        vars(found).update(vars(self))
        found._stand_on(name)
        return found

    def __repr__(self) -> str:
        return (
            f"HookedModel({self.name!r}, {type(self.hf).__name__}, {self.n_layers} layers × {self.n_heads} heads, "
            f"d_model {self.d_model})"
        )

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: they carry no edits, and register their own modules."""
        return {name: value for name, value in vars(self).items() if name not in ("key", "_keys")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._claim()
        self.key = self._keys[self.part_name]

    @property
    def device(self) -> torch.device:
        return self._first_weight().device

    @property
    def dtype(self) -> torch.dtype:
        return self._first_weight().dtype

    def _first_weight(self) -> Tensor:
        table = embedding(self.hf)
        return next(self.hf.parameters()) if table is None else table.weight

    @property
    def start(self) -> int:
        """The token that an encoder–decoder model's decoder begins with."""
        known = (getattr(self.hf.config, f"{n}_token_id", None) for n in ("decoder_start", "bos", "pad"))
        return next((n for n in known if isinstance(n, int)), 0)

    @property
    def patches(self) -> Patches | None:
        """How images become tokens: `patches.grid` (rows, columns) behind `patches.prefix` tokens. None without."""
        return next((part.patches for part in self.parts.values() if part.patches is not None), None)

    def attention_module(self, layer: int) -> nn.Module:
        """The transformers module of one layer's attention."""
        if layer not in self._modules:
            raise ModelError(f"no attention in layer {layer}; the model has layers {self.layers}")
        return self._modules[layer]

    # --- prompts

    def to_tokens(
        self, given: Any = None, attention_mask: Any = None, side: Literal["left", "right"] = "right", **more: Any
    ) -> Tokens:  # fmt: skip
        """All that a call is given as checked `Tokens` (ids int64 and mask bool, both [batch, position], and the rest).

        `given` is texts or ids, or a floating-point tensor of images or audio features; `more` goes by transformers'
        names (inputs.py).
        """
        found = inputs.read(self, given, attention_mask, side, more)
        if self.vocab:
            tokens.check(found, self.vocab, self.context)
        return found

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

    def __call__(
        self, given: Any = None, attention_mask: Any = None, *, grad: bool = False, **more: Any
    ) -> Tensor:
        """Logits [batch, position, vocab]. No gradients unless `grad`, or a gate that carries one, asks for them.

        A model with a head of another kind gives what that gives: classes, or the likeness [image, text] of pairs.
        """
        out = self._forward(self.to_tokens(given, attention_mask, **more), grad)
        found = next((x for x in (getattr(out, n, None) for n in LOGITS) if x is not None), None)
        if found is None:
            raise ModelError(
                f"{self.name} has no language head, so it gives no logits; use model.embeddings(...)"
            )
        return found

    def embeddings(
        self, given: Any = None, attention_mask: Any = None, *, grad: bool = False, **more: Any
    ) -> Tensor:
        """Last hidden state [batch, position, d_model] of this part, also of models without a language head."""
        found = self.to_tokens(given, attention_mask, **more)
        out = self._forward(found, grad, output_hidden_states=True)
        return inputs.last_hidden(out, self.part_name)

    def loss(
        self, given: Any = None, attention_mask: Any = None, *, grad: bool = False, **more: Any
    ) -> Tensor:
        """Mean next-token loss of each example, [batch], in nats, over its real tokens; causal models only."""
        found = self.to_tokens(given, attention_mask, **more)
        if not self.causal:
            raise ModelError(
                f"{self.name} reads in both directions, so it has no next-token loss; give a loss= of your own"
            )
        if int(found.mask.sum(-1).min()) < 2:
            raise PromptError("a next-token loss needs at least two tokens in every example")
        return next_token_loss(self(found, grad=grad), found)

    def _forward(self, given: Tokens, grad: bool = False, **more: Any) -> Any:
        self.check_ready(given)
        gates = context.current_gates(self.key)
        wants_grad = grad or (gates is not None and gates.requires_grad)
        if self.read_only and context.heard(self.key):
            return dense.run(self, given, more)
        with torch.enable_grad() if wants_grad else torch.no_grad():
            return self.hf(**inputs.arguments(self, given), **more)

    def _check_edits(self, given: Tokens, more: int = 0) -> None:
        """Refuse an edit that names a position which no row of the prompt has."""
        for name, part in self.parts.items():
            prepared = [p for p in context.active(self._keys[name]) if isinstance(p, Prepared)]
            sides = [axis(part, side, given) for side in (part.queries, part.keys)] if prepared else []
            longest = max((int(side.mask.sum(-1).max()) for side in sides if side is not None), default=0)
            longest += more if name == next(iter(self.parts)) or part.crosses else 0
            if longest:
                check_prompt(prepared, given, longest, more)

    def generate(
        self, given: Any = None, max_new_tokens: int = 20, attention_mask: Any = None, *, record: bool = False,
        on_token: generation.OnToken | None = None, statistics: Iterable[str] = DEFAULT_STATISTICS,
        layers: Layers = "all", keep: Iterable[str] = ("qk",), groups: plan.Groups = None,
        keep_on: destination.KeepOn = "device", path: str | Path | None = None, **options: Any,
    ) -> Any:  # fmt: skip
        """Greedy continuation with a key–value cache, edits on: text for a text, texts for texts, ids for ids.

        What comes back holds the prompt too, or the decoder's start; with `record=True` it is that and one `Record` of
        all of it, made as the tokens come, with the settings of `record` (the group "generated" is of the new tokens).
        `on_token` is called with each new piece of text, texts, or ids [batch]. `options` that are inputs of the model
        (`pixel_values` …) are read as in a call; the others go to transformers' own `generate`.
        """
        wanted = generation.Wanted(statistics, layers, keep, groups, keep_on, path) if record else None
        return generation.generate(self, given, attention_mask, max_new_tokens, wanted, on_token, options)

    def check_ready(self, given: Tokens, more: int = 0) -> None:
        """Refuse a model that can not run as it is, and edits that name positions beyond `given` and `more` tokens."""
        if self.hf.training:
            raise ModelError(
                f"{self.name} is in training mode, where dropout makes attention random; call model.hf.eval()"
            )
        if any(getattr(module, "_compiled_call_impl", None) is not None for module in self.hf.modules()):
            raise ModelError(
                f"{self.name} was compiled in place, and torch.compile can not trace a model that Headwater reads; "
                "load it again and leave it uncompiled"
            )
        self._check_edits(given, more)

    # --- looking inside

    def record(
        self, given: Any = None, attention_mask: Any = None, *, statistics: Iterable[str] = DEFAULT_STATISTICS,
        layers: Layers = "all", keep: Iterable[str] = ("qk",), groups: plan.Groups = None,
        keep_on: destination.KeepOn = "device", path: str | Path | None = None, **more: Any,
    ) -> Record:  # fmt: skip
        """Run once and keep what defines every attention map, with exact statistics, in linear memory.

        `statistics` are listed in kernels/maps/statistics.py; "mass" needs `groups`, names of key positions, or names
        of the model's own groups (`token_groups`). `keep` is () for statistics alone, or "qk" or "qkv" and with it, or
        alone, "residual". Under `model.edit` the record is of the edited weights. `keep_on` is "device" (with the
        model), "cpu", or "disk": written layer by layer while the model runs, to `path`, which appears when it is
        whole, or to a file without a name; records larger than memory are made so. A model of several parts gives the
        record of its main part, with those of the others in `record.parts`; `model.part(name).record(…)` is of that
        part alone.
        """
        found = self.to_tokens(given, attention_mask, **more)
        recorders = plan.recorders(self, found, statistics, layers, keep, groups)
        cost = plan.total(self, found, recorders)
        with destination.keeping(recorders, keep_on, path, cost) as kept:
            with destination.listening(recorders):
                self._forward(found)
            return kept.finish(plan.finish(self, found, recorders), self.part_name)

    def estimate(
        self, given: Any = None, attention_mask: Any = None, *, statistics: Iterable[str] = DEFAULT_STATISTICS,
        layers: Layers = "all", keep: Iterable[str] = ("qk",), groups: plan.Groups = None, **more: Any,
    ) -> Estimate:  # fmt: skip
        """Bytes that `record` with the same settings would keep, without running the model."""
        found = self.to_tokens(given, attention_mask, **more)
        return plan.total(self, found, plan.recorders(self, found, statistics, layers, keep, groups))

    def token_groups(self, given: Tokens, prompt: int | None = None) -> dict[str, Tensor]:
        """The keys of this part by kind, bool [batch, position], of `to_tokens(…)`.

        "special" (the tokenizer's special tokens; an image's class and register tokens), "image" (patches, or the
        places in a text that stand for them), "generated" (from position `prompt` on), "text" (every other). Padding is
        in none.
        """
        return plan.token_groups(self, given, prompt)

    def head_outputs(
        self, given: Any = None, attention_mask: Any = None, *, edited: bool = True, **more: Any
    ) -> Tensor:
        """z of every head before the output projection, [batch, layer, head, position, d_value].

        `edited=False` runs the model as it is, whatever edits are on.
        """
        self._refuse_read_only("give no head outputs")
        found = self.to_tokens(given, attention_mask, **more)
        outputs = _Outputs(self.key)
        with context.listening(outputs), contextlib.nullcontext() if edited else context.unedited(self.key):
            self._forward(found)
        return torch.stack([outputs.by_layer[layer] for layer in self.layers], 1)

    # --- changing

    def edit(
        self, *edits: Edit, groups: Mapping[str, Any] | None = None
    ) -> contextlib.AbstractContextManager[None]:
        """`with model.edit(…):` — what runs inside sees these edits, in this thread or task alone. Blocks nest.

        `groups` names positions, as in {"subject": [3, 4]}, so that the edits can say keys="subject".
        """
        self._refuse_read_only("can not be edited")
        for given in edits:
            if not isinstance(given, Edit):
                raise EditError(
                    f"model.edit takes edits such as hw.ScaleHeads({{'2.3': 0.0}}); got {given!r}"
                )
            if given.own_position and self.parts[self.part_name].crosses:
                raise EditError(
                    f"{type(given).__name__} has no meaning in cross-attention: no key is the query's own position"
                )
        return applied(self, [given.prepare(self, groups or {}) for given in edits])

    @property
    def edits(self) -> tuple[Edit, ...]:
        """The edits that are on in this context."""
        return tuple(p.edit for p in context.active(self.key) if isinstance(p, Prepared))

    def gated(self, gates: Tensor) -> contextlib.AbstractContextManager[None]:
        """`with model.gated(gates):` — every head's output times `gates` [batch|1, layer, head]; gradients flow.

        Gates [batch|1, layer, head, position] act at each position by itself.
        """
        self._refuse_read_only("can not be edited")
        if gates.dim() not in (3, 4) or gates.shape[1:3] != (self.n_layers, self.n_heads):
            raise EditError(
                f"gates must be [batch or 1, {self.n_layers} layers, {self.n_heads} heads], and may have one more "
                f"axis for positions; got {list(gates.shape)}"
            )
        return context.gated(self.key, gates)

    def _refuse_read_only(self, what: str) -> None:
        if self.read_only:
            raise EditError(f"the heads of {self.name} {what}: {self.read_only}")

    def using(self, backend: str) -> contextlib.AbstractContextManager[None]:
        """`with model.using("blocked"):` — run attention on the backend of that name, never on another."""
        return context.using(backend)


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
