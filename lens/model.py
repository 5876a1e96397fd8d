"""`HookedModel`: a transformers model whose attention Headwater records and edits, without changing its weights.

The model runs its own transformers code; only attention goes through `lens/attention/function.py`. Edits act on logits,
records and generation of the caller's context (thread or task), and of no other.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from jaxtyping import Bool, Float, Int
from torch import Tensor

from headwater.kernels.notebook import table
from headwater.lens.attention import context
from headwater.lens.edits.base import Edit, Prepared
from headwater.lens.edits.block import EditBlock, checked
from headwater.lens.errors import EditError, ModelError, PromptError
from headwater.lens.examples.inputs import as_inputs
from headwater.lens.mixers.effective_map import EffectiveMap
from headwater.lens.mixers.sampled import SampledMap
from headwater.lens.models import inputs
from headwater.lens.models.beginning import first_token
from headwater.lens.models.classes import logits_of
from headwater.lens.models.token_groups import token_groups
from headwater.lens.naming.heads import Layers
from headwater.lens.naming.tokens import Tokens
from headwater.lens.records import destination, plan
from headwater.lens.records.memory import Estimate, total
from headwater.lens.records.record import DEFAULT_STATISTICS, Record
from headwater.lens.running import generation, losses
from headwater.lens.running.forward import forward, head_outputs, mixer_maps, record, sampled_maps
from headwater.lens.transformer_lens.face import TransformerLens


class HookedModel(TransformerLens):
    """An open model, made by `headwater.load`.

    `hf` is the transformers model. `layers` are the layers with attention, `n_heads` the number of query heads,
    `context` the longest prompt in tokens (None: no known limit), `has_lm_head` whether it gives logits over a
    vocabulary. In a model with several parts (models/parts.py) they describe the main part; `part(name)` gives the
    others. `read_only` says why attention can be read but not edited ("" if it can). `stack` lists what every block
    does, in order (models/stack.py): attention that is read, mixers (linear attention, state spaces …) and MLPs.
    `mixers` are the mixers alone. `unread` names all that mixes positions and has no map: mixers, and stacks that
    were not read.

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

    def __repr__(self) -> str:
        told = first_token(self).partition(" (")[0]
        return (
            super().__repr__()
            if self.tokenizer is None
            else f"{super().__repr__()[:-1]}, first token {told})"
        )

    def _repr_html_(self) -> str:
        part, shapes = self.parts[self.part_name], self.parts[self.part_name].shapes.values()
        numbers = {"key heads": "kv", "features per head": "d_head"}
        listed = {name: sorted({getattr(shape, of) for shape in shapes}) for name, of in numbers.items()}
        facts = {
            "part": repr(part), "other parts": ", ".join(name for name in self.parts if name != self.part_name),
            **{name: " or ".join(map(str, found)) for name, found in listed.items()},
            "d_model": self.d_model, "context": self.context and f"{self.context:,} tokens",
            "vocabulary": self.vocab and f"{self.vocab:,} tokens", "first token": first_token(self),
            "parameters": f"{sum(weight.numel() for weight in self.hf.parameters()):,}",
            "precision": f"{str(self.dtype).removeprefix('torch.')} on {self.device}",
            "edits": ", ".join(map(repr, context.user_edits(self.key))), "read only": self.read_only,
            "not covered": "; ".join(self.unread),
        }  # fmt: skip
        return table(f"{self.name} ({type(self.hf).__name__})", facts)

    # --- prompts

    @property
    def first_token(self) -> str:
        """Which token is the first of a text, and who puts it there: "'<s>' (the tokenizer puts it)"."""
        return first_token(self)

    def to_tokens(
        self, given: Any = None, attention_mask: Any = None, side: Literal["left", "right"] = "right", *,
        prepend_bos: bool | None = None, **more: Any,
    ) -> Int[Tokens, "batch position"]:  # fmt: skip
        """The inputs of a call as checked `Tokens`: ids int64 and mask bool, [batch, position], and further inputs.

        `given` is a text, a pair of texts `("a", "b")`, chat messages `[{"role": "user", "content": "a"}]`, a list of
        these, token ids, or a floating-point tensor of images or audio features; or an `Example`, a picture (a path, an
        image of PIL, an array of 8-bit numbers), a sound (a path, or (samples, samples a second)) or a list of these,
        which go through the model's own processor (lens/examples/). `more` are further inputs under transformers' names
        (models/inputs.py), such as `inputs_embeds` [batch, position, d_model] in the place of tokens. Texts of unequal
        length are padded on `side`, or on the other one where `side` would change what the model gives.
        `prepend_bos=True` puts the token that begins a text in front, False leaves it out, None does as `load` was
        told: by default what the tokenizer does. A text that holds a beginning gets no second one, with a warning.
        PromptError says what is wrong. Every method below takes the same inputs, or the `Tokens` that this returns.
        """
        found = as_inputs(self, given, attention_mask, more, side, prepend_bos)
        return inputs.read(self, found.given, found.mask, side, found.more, prepend_bos=found.prepend_bos)

    # --- running

    def __call__(
        self, given: Any = None, attention_mask: Any = None, *, grad: bool = False, **more: Any
    ) -> Float[Tensor, "batch position vocab"] | Float[Tensor, "batch class"]:
        """Logits [batch, position, vocab], with the edits that are on; [batch, class] from a classifier or a reward
        model, [batch, position, class] from a token classifier, [batch, position, 2] (start, end) from a model that
        answers questions; `classes` holds the labels.

        CLIP and models like it give the similarity [image, text]. Gradients are tracked with `grad=True`, or if a gate
        requires one. ModelError for a model without logits: use `embeddings`.
        """
        found = logits_of(forward(self, self.to_tokens(given, attention_mask, **more), grad))
        if found is None:
            raise ModelError(
                f"{self.name} has no language head, so it gives no logits; use model.embeddings(...)"
            )
        return found

    def embeddings(
        self, given: Any = None, attention_mask: Any = None, *, grad: bool = False, **more: Any
    ) -> Float[Tensor, "batch position d_model"]:
        """The last hidden state of this part, [batch, position, d_model], with the edits that are on."""
        found = self.to_tokens(given, attention_mask, **more)
        out = forward(self, found, grad, output_hidden_states=True)
        return inputs.last_hidden(out, self.part_name)

    def loss(
        self, given: Any = None, attention_mask: Any = None, *, grad: bool = False, **more: Any
    ) -> Float[Tensor, " batch"]:
        """The loss of each example, [batch], in nats, of what this kind of model is trained for (running/losses.py).

        Causal language models: the mean over the real next tokens, image tokens left out. Encoder–decoders: the mean
        over the decoder's tokens. Classifiers and masked language models: the cross-entropy of `label`. Two towers
        (CLIP): 1 − cosine similarity of each text and its own picture. ModelError where none of these has a meaning.
        """
        return losses.loss(self, self.to_tokens(given, attention_mask, **more), grad)

    def generate(
        self, given: Any = None, max_new_tokens: int = 20, attention_mask: Any = None, *, record: bool = False,
        on_token: generation.OnToken | None = None, against: generation.Branch | None = None,
        statistics: Iterable[str] = DEFAULT_STATISTICS, layers: Layers = "all", keep: Iterable[str] = ("qk",),
        groups: plan.Groups = None, keep_on: destination.KeepOn = "device", path: str | Path | None = None,
        **options: Any,
    ) -> Any:  # fmt: skip
        """Greedy continuation with a key–value cache, with the edits that are on: text for a text, ids for ids.

        The result includes the prompt, or the decoder's start token. With `record=True` it is the pair (output,
        record): one `Record` of the whole text, made while it is generated, with the settings of `record`; its group
        "generated" holds the new tokens. `on_token` is called with each new piece of text, list of pieces, or ids
        [batch]. `against=hw.Branch(edits, …)` decodes against a second run with other edits or another prompt
        (running/branches.py); the record is of the first run alone. `options` that are model inputs (`pixel_values` …)
        are read as in a call; the others go to transformers' `generate`.
        """
        wanted = generation.Wanted(statistics, layers, keep, groups, keep_on, path) if record else None
        return generation.generate(
            self, given, attention_mask, max_new_tokens, wanted, on_token, against, self.edit, options
        )

    # --- looking inside

    def record(
        self, given: Any = None, attention_mask: Any = None, *, statistics: Iterable[str] = DEFAULT_STATISTICS,
        layers: Layers = "all", keep: Iterable[str] = ("qk",), groups: plan.Groups = None,
        keep_on: destination.KeepOn = "device", path: str | Path | None = None, grad: bool = False, **more: Any,
    ) -> Record:  # fmt: skip
        """Run once and keep q, k and log-sum-exp of every layer, with exact statistics, in memory linear in the text.

        `statistics`: names from kernels/maps/statistics.py; "mass" needs `groups`, {name: key positions} or names of
        `token_groups`. `keep`: () for statistics only, "qk" for maps, "qkv" for maps and values; "residual" adds the
        residual stream, or stands alone; so does "mixers" the exact maps of layers without softmax attention, as in
        `mixer_maps`. `layers` limits all but the mixers. With edits on, the record is of the edited
        weights. `keep_on`: "device" (the model's), "cpu" or "disk". On "disk" each layer is written while the model
        runs, to `path` or a temporary file, so a record may be larger than memory; `path` appears when it is complete.
        A model with several parts gives the record of its main part, the others in `record.parts`;
        `model.part(name).record(…)` records that part only. ResourceError if there is no room.

        With `grad=True` maps, values, residual streams and statistics carry gradients to the weights and inputs of the
        model, in every part, and `record.output` is the model's output of the same run. A graph holds what training
        would, and a few tensors of queries × keys for each layer of which weights or statistics are asked; it lives as
        long as the record. `statistics=()` saves the most. No file holds a graph.
        """
        found = self.to_tokens(given, attention_mask, **more)
        recorders = plan.recorders(self, found, statistics, layers, keep, groups, grad)
        return record(self, found, recorders, keep_on, path)

    def estimate(
        self, given: Any = None, attention_mask: Any = None, *, statistics: Iterable[str] = DEFAULT_STATISTICS,
        layers: Layers = "all", keep: Iterable[str] = ("qk",), groups: plan.Groups = None, **more: Any,
    ) -> Estimate:  # fmt: skip
        """The memory, in bytes, of `record` with the same settings; the model does not run."""
        found = self.to_tokens(given, attention_mask, **more)
        return total(plan.recorders(self, found, statistics, layers, keep, groups).values())

    def token_groups(
        self, given: Tokens, prompt: int | None = None
    ) -> dict[str, Bool[Tensor, "batch position"]]:
        """The key tokens of this part by kind, as {name: bool [batch, position]}; `given` comes from `to_tokens`.

        "special": special tokens of the tokenizer, class and register tokens of an image. "image": patches, or image
        tokens in a text. "generated": tokens from position `prompt` on. "text": all other tokens. Groups do not
        overlap, and padding is in none.
        """
        if not isinstance(given, Tokens):
            raise PromptError(
                f"token_groups takes what model.to_tokens(prompt) returns; got {type(given).__name__}"
            )
        return token_groups(self, given, prompt)

    def head_outputs(
        self, given: Any = None, attention_mask: Any = None, *, edited: bool = True, **more: Any
    ) -> Float[Tensor, "batch layer head position d_value"]:
        """The output z of every head before the output projection, [batch, layer, head, position, d_value].

        In gated attention (Qwen3-Next) z is taken before the gate, where edits of heads act; `patch`, edges and logit
        attribution take a head behind it.

        `edited=False` runs the model without the edits that are on. EditError for a read-only model.
        """
        return head_outputs(self, self.to_tokens(given, attention_mask, **more), edited)

    def mixer_maps(
        self, given: Any = None, attention_mask: Any = None, **more: Any
    ) -> dict[int, EffectiveMap]:
        """The exact map of every layer that mixes positions without softmax attention, by layer, from one run.

        Linear attention, gated delta rules, selective state spaces, RG-LRU and short convolutions: `map @ values` on
        the layer's inner values, signed (lens/mixers/effective_map.py). Each is held to what the layer gave in the run.
        ModelError, by name, for a mixer of another kind or one that does not agree, and for a model without mixers.
        """
        return mixer_maps(self, self.to_tokens(given, attention_mask, **more))

    def sampled_maps(
        self, given: Any = None, attention_mask: Any = None, **more: Any
    ) -> dict[str, SampledMap]:
        """The exact map of every module of deformable attention (Deformable DETR, RT-DETR), by its path, from one run.

        Each lists the cells of the feature grids that a query reads, with level, row and column
        (lens/mixers/sampled.py), in memory linear in the queries, and is held to what the module weighed. They are by
        path because the layers of an encoder and of a decoder have the same numbers. ModelError, by name, for a module
        of another form or one that does not agree, and for a model without such modules.
        """
        return sampled_maps(self, self.to_tokens(given, attention_mask, **more))

    # --- changing

    def edit(
        self, *edits: Edit, groups: Mapping[str, Any] | None = None
    ) -> contextlib.AbstractContextManager[None]:
        """`with model.edit(…):` the edits act on every run of the model inside the block, in this thread or task only.

        Blocks nest: inner edits are added to outer ones. `groups` gives positions a name, as in {"subject": [3, 4]}, so
        that an edit can say keys="subject". EditError for an edit that does not fit this model.
        """
        self.refuse_read_only("can not be edited")
        for given in map(checked, edits):
            if given.own_position and self.parts[self.part_name].crosses:
                raise EditError(
                    f"{type(given).__name__} has no meaning in cross-attention: no key is the query's own position; "
                    "edit another part"
                )
        return EditBlock(self, [given.prepare(self, groups or {}) for given in edits])

    @property
    def edits(self) -> tuple[Edit, ...]:
        """The edits of users that are on in this context."""
        return tuple(p.edit for p in context.active(self.key) if isinstance(p, Prepared))

    def gated(self, gates: Tensor) -> contextlib.AbstractContextManager[None]:
        """`with model.gated(gates):` multiplies the output of every head by `gates`, [batch|1, layer, head].

        Gates [batch|1, layer, head, position] differ by position. If `gates` requires a gradient, runs inside track it.
        """
        self.refuse_read_only("can not be edited")
        if (
            not isinstance(gates, Tensor)
            or gates.dim() not in (3, 4)
            or gates.shape[1:3] != (self.n_layers, self.n_heads)
        ):
            raise EditError(
                f"gates must be [batch or 1, {self.n_layers} layers, {self.n_heads} heads], and may have one more "
                f"axis for positions; got {list(gates.shape) if isinstance(gates, Tensor) else type(gates).__name__}"
            )
        return context.gated(self.key, gates)

    def acting(self, edits: Sequence[context.ActiveEdit]) -> contextlib.AbstractContextManager[None]:
        """`with model.acting(edits):` puts on edits in the form that layers take, as analyses make them.

        EditError for a model whose attention can not be edited.
        """
        self.refuse_read_only("can not be edited")
        return context.editing(self.key, edits)

    def using(self, backend: str) -> contextlib.AbstractContextManager[None]:
        """`with model.using("blocked"):` runs attention on this backend, and raises an error where it can not."""
        return context.using(backend)
