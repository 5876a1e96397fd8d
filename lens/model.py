"""`HookedModel`: a transformers model whose attention Headwater reads and edits, without touching its weights.

The model runs through its own code; attention alone goes through `lens/attention/function.py`. Logits, records and
generation see whatever edits are on in the caller's context, and in no other.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from jaxtyping import Bool, Float, Int
from torch import Tensor

from headwater.lens.attention import context
from headwater.lens.edits.base import Edit, Prepared, applied
from headwater.lens.errors import EditError, ModelError, PromptError
from headwater.lens.models import inputs
from headwater.lens.models.token_groups import token_groups
from headwater.lens.naming.heads import Layers
from headwater.lens.naming.tokens import Tokens
from headwater.lens.records import destination, plan
from headwater.lens.records.memory import Estimate, total
from headwater.lens.records.record import DEFAULT_STATISTICS, Record
from headwater.lens.running import generation
from headwater.lens.running.forward import forward, head_outputs, next_token_loss, record
from headwater.lens.transformer_lens.face import TransformerLens

LOGITS = ("logits", "logits_per_image")


class HookedModel(TransformerLens):
    """A model that is open. Make it with `headwater.load`.

    `hf` is the transformers model, `layers` the layers that have attention; `n_heads` counts query heads. `context` is
    the longest prompt it can run (None: no limit known). `has_lm_head` says whether there are logits over a vocabulary.
    All of these are of the main part where the model has several (models/parts.py); `part(name)` gives the others.
    `read_only` is the reason where attention can be read but not edited, `unread` the stacks that were not read at all.

    >>> import headwater as hw
    >>> model = hw.load("tasks-4l")
    >>> prompt = "When Mary and John went to the store , John gave a drink to"

    >>> model(prompt).shape  # logits [batch, position, vocab]
    torch.Size([1, 15, 368])
    >>> model.record(prompt).pattern(layer=2, head=0).shape
    torch.Size([1, 15, 15])
    >>> with model.edit(hw.ScaleHeads({"2.0": 0.0})):
    ...     print(model.generate(prompt, max_new_tokens=1))
    When Mary and John went to the store , John gave a drink to Mary
    """

    # --- prompts

    def to_tokens(
        self, given: Any = None, attention_mask: Any = None, side: Literal["left", "right"] = "right", **more: Any
    ) -> Int[Tokens, "batch position"]:  # fmt: skip
        """All that a call is given as checked `Tokens` (ids int64 and mask bool, both [batch, position], and the rest).

        `given` is texts or ids, or a floating-point tensor of images or audio features; `more` goes by transformers'
        names (models/inputs.py).
        """
        return inputs.read(self, given, attention_mask, side, more)

    # --- running

    def __call__(
        self, given: Any = None, attention_mask: Any = None, *, grad: bool = False, **more: Any
    ) -> Float[Tensor, "batch position vocab"] | Float[Tensor, "batch class"]:
        """Logits [batch, position, vocab]. No gradients unless `grad`, or a gate that carries one, asks for them.

        A model with a head of another kind gives what that gives: classes, or the likeness [image, text] of pairs.
        """
        out = forward(self, self.to_tokens(given, attention_mask, **more), grad)
        found = next((x for x in (getattr(out, n, None) for n in LOGITS) if x is not None), None)
        if found is None:
            raise ModelError(
                f"{self.name} has no language head, so it gives no logits; use model.embeddings(...)"
            )
        return found

    def embeddings(
        self, given: Any = None, attention_mask: Any = None, *, grad: bool = False, **more: Any
    ) -> Float[Tensor, "batch position d_model"]:
        """Last hidden state [batch, position, d_model] of this part, also of models without a language head."""
        found = self.to_tokens(given, attention_mask, **more)
        out = forward(self, found, grad, output_hidden_states=True)
        return inputs.last_hidden(out, self.part_name)

    def loss(
        self, given: Any = None, attention_mask: Any = None, *, grad: bool = False, **more: Any
    ) -> Float[Tensor, "batch"]:
        """Mean next-token loss of each example, [batch], in nats, over its real tokens; causal models only."""
        found = self.to_tokens(given, attention_mask, **more)
        if not self.causal:
            raise ModelError(
                f"{self.name} reads in both directions, so it has no next-token loss; give a loss= of your own"
            )
        if int(found.mask.sum(-1).min()) < 2:
            raise PromptError("a next-token loss needs at least two tokens in every example")
        return next_token_loss(self(found, grad=grad), found)

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
        return record(self, found, recorders, keep_on, path)

    def estimate(
        self, given: Any = None, attention_mask: Any = None, *, statistics: Iterable[str] = DEFAULT_STATISTICS,
        layers: Layers = "all", keep: Iterable[str] = ("qk",), groups: plan.Groups = None, **more: Any,
    ) -> Estimate:  # fmt: skip
        """Bytes that `record` with the same settings would keep, without running the model."""
        found = self.to_tokens(given, attention_mask, **more)
        return total(plan.recorders(self, found, statistics, layers, keep, groups).values())

    def token_groups(
        self, given: Tokens, prompt: int | None = None
    ) -> dict[str, Bool[Tensor, "batch position"]]:
        """The keys of this part by kind, bool [batch, position], of `to_tokens(…)`.

        "special" (the tokenizer's special tokens; an image's class and register tokens), "image" (patches, or the
        places in a text that stand for them), "generated" (from position `prompt` on), "text" (every other). Padding is
        in none.
        """
        return token_groups(self, given, prompt)

    def head_outputs(
        self, given: Any = None, attention_mask: Any = None, *, edited: bool = True, **more: Any
    ) -> Float[Tensor, "batch layer head position d_value"]:
        """z of every head before the output projection, [batch, layer, head, position, d_value].

        `edited=False` runs the model as it is, whatever edits are on.
        """
        return head_outputs(self, self.to_tokens(given, attention_mask, **more), edited)

    # --- changing

    def edit(
        self, *edits: Edit, groups: Mapping[str, Any] | None = None
    ) -> contextlib.AbstractContextManager[None]:
        """`with model.edit(…):` — what runs inside sees these edits, in this thread or task alone. Blocks nest.

        `groups` names positions, as in {"subject": [3, 4]}, so that the edits can say keys="subject".
        """
        self.refuse_read_only("can not be edited")
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
        self.refuse_read_only("can not be edited")
        if gates.dim() not in (3, 4) or gates.shape[1:3] != (self.n_layers, self.n_heads):
            raise EditError(
                f"gates must be [batch or 1, {self.n_layers} layers, {self.n_heads} heads], and may have one more "
                f"axis for positions; got {list(gates.shape)}"
            )
        return context.gated(self.key, gates)

    def using(self, backend: str) -> contextlib.AbstractContextManager[None]:
        """`with model.using("blocked"):` — run attention on the backend of that name, never on another."""
        return context.using(backend)
