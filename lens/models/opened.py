"""`Opened`: what is known of a transformers model whose attention runs through Headwater. It does not run the model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor, nn

from headwater.lens.attention.function import register_layers
from headwater.lens.digest.revision import Revision, of_processor, of_tokenizer
from headwater.lens.errors import EditError, ModelError, PromptError, nearest
from headwater.lens.models.norms import HEAD
from headwater.lens.models.parts import Part, Shape
from headwater.lens.models.patches import Patches
from headwater.lens.models.signature import (
    embedding,
    first_position,
    image_token,
    image_tokens,
    shared_embedding,
)
from headwater.lens.models.stack import Mixer, mixers_of, named
from headwater.lens.naming.texts import encoding
from headwater.lens.naming.token_bytes import token_text


class Opened:
    """An open model, seen from one of its parts; the docstring of `HookedModel` explains the attributes."""

    def __init__(
        self, hf: Any, tokenizer: Any, parts: Mapping[str, Part], name: str, *,
        unread: tuple[str, ...] = (), read_only: str = "",
    ) -> None:  # fmt: skip
        text = hf.config.get_text_config()
        table = embedding(hf)
        self.hf = hf
        inside = getattr(tokenizer, "tokenizer", tokenizer)  # a processor has a tokenizer inside
        self.tokenizer = inside if hasattr(inside, "decode") else None  # one of sounds alone has none
        self.processor = tokenizer  # what makes inputs of texts, pictures and sounds
        self.name = name
        self.weights_digest = Revision(hf)
        self.parts = dict(parts)
        self.unread = unread
        self.read_only = read_only
        self.classes: tuple[str, ...] = ()  # the labels of a classifier, by index
        self.by_choice = (
            False  # whether its texts are choices, [row, choice, position]; every row is one choice then
        )
        self.sample: Mapping[str, Tensor] = {}  # the inputs on which it was opened; empty where nobody knows
        self.moved_by_padding: frozenset[tuple[str, str]] = frozenset()  # (text, side), found on load
        self._other_attention: dict[str, list[str]] = {}  # by part, as the stacks have it
        self.prepend_bos: bool | None = None  # None: a text begins as the tokenizer makes it
        self.is_encoder_decoder = bool(getattr(hf.config, "is_encoder_decoder", False))
        self.vocab = int(table.num_embeddings) if table is not None else 0
        self.source_context: int | None = getattr(text, "max_position_embeddings", None)
        if (self.source_context or 0) < 0:  # XLNet has no limit
            self.source_context = None
        self.context: int | None = getattr(text, "max_target_positions", self.source_context)
        if self.context is not None:
            self.context -= first_position(hf)  # the first rows of the position table are not used
        self.has_lm_head = self.vocab > 0 and hf.get_output_embeddings() is not None
        self.image_token = image_token(hf)
        self.image_tokens = image_tokens(hf) if "vision" in self.parts else 0
        self._register_layers()
        self._stand_on(next(iter(self.parts)))

    def _register_layers(self) -> None:
        """Register the attention modules of every part with the attention function.

        Cross-attention takes its query positions from the self-attention of the same tokens, the decoder's.
        """
        crossing = next((part for part in self.parts.values() if part.crosses), None)
        alike = (
            n for n, p in self.parts.items() if crossing and not p.crosses and p.queries == crossing.queries
        )
        tells = next(alike, None)
        self.part_keys: dict[str, object] = {}
        for name, part in sorted(self.parts.items(), key=lambda each: each[1].crosses):
            rows = self.part_keys.get(tells or "") if part.crosses else None
            self.part_keys[name] = register_layers(part.modules, rows, name == tells)

    def _stand_on(self, name: str) -> None:
        part = self.parts[name]
        self.part_name = name
        self.causal = part.causal
        self.layers = sorted(part.modules.values())
        self.stack = part.stack
        self.flows = part.flows
        self.head_flow = self.parts[next(iter(self.parts))].flows.get(HEAD)
        self.n_layers = len(self.layers)
        self.d_model = part.d_model
        self.key = self.part_keys[name]
        self._modules = {layer: module for module, layer in part.modules.items()}

    def part(self, name: str) -> Self:
        """The same model seen from another part: its layers, heads, edits and records. `model.parts` lists them.

        `with model.part("cross").edit(…):` edits cross-attention; `model.part("vision").record(…)` is of the images.
        """
        if name not in self.parts:
            raise ModelError(f"{self.name} has no part {name!r}: {nearest(name, self.parts)}")
        found = object.__new__(type(self))
        vars(found).update(vars(self))
        found._stand_on(name)
        return found

    def __repr__(self) -> str:
        left_out = f", not covered: {'; '.join(self.unread)}" if self.unread else ""
        heads = _listed({shape.heads for shape in self.parts[self.part_name].shapes.values()}, " or ")
        return (
            f"{type(self).__name__}({self.name!r}, {type(self.hf).__name__}, {self.n_layers} layers × "
            f"{heads} heads, d_model {self.d_model}{left_out})"
        )

    def shape(self, layer: int) -> Shape:
        """`heads`, `kv`, `d_head` and `d_value` of one layer: query heads, key–value heads, features of a head's
        queries, and of its output. Layers may differ."""
        self.attention_module(layer)
        return self.parts[self.part_name].shapes[layer]

    @property
    def n_heads(self) -> int:
        """Query heads per layer; ModelError where layers differ."""
        return self._of_all("heads", "query heads")

    @property
    def n_kv_heads(self) -> int:
        """Key–value heads per layer; ModelError where layers differ."""
        return self._of_all("kv", "key–value heads")

    @property
    def d_head(self) -> int:
        """Features of a head's queries and keys; ModelError where layers differ."""
        return self._of_all("d_head", "features per head")

    @property
    def d_value(self) -> int:
        """Features of a head's values and output; ModelError where layers differ."""
        return self._of_all("d_value", "features per head's output")

    def _of_all(self, what: str, words: str) -> int:
        found = {getattr(shape, what) for shape in self.parts[self.part_name].shapes.values()}
        if len(found) > 1:
            raise ModelError(
                f"the layers of {self.name} have {_listed(found, ' and ')} {words}, so what takes one number for all "
                "layers can not be asked of it; model.shape(layer) tells a layer's own"
            )
        return next(iter(found))

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles, without the keys: a copy has no edits and registers its own modules."""
        return {name: value for name, value in vars(self).items() if name not in ("key", "part_keys")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._register_layers()
        self.key = self.part_keys[self.part_name]

    @property
    def revision(self) -> str:
        """The digest of everything in the model that decides its numbers, as it is now (digest/revision.py)."""
        return self.weights_digest.now()

    @cached_property
    def tokenizer_revision(self) -> str:
        """The digest of what decides which ids a text becomes; empty without a tokenizer."""
        return of_tokenizer(self.tokenizer)

    @property
    def processor_revision(self) -> str:
        """The digest of how pictures and sounds become numbers; empty without a processor."""
        return of_processor(self.processor)

    @property
    def device(self) -> torch.device:
        return self._first_weight().device

    @property
    def dtype(self) -> torch.dtype:
        return self._first_weight().dtype

    def _first_weight(self) -> Tensor:
        table = shared_embedding(self.hf)
        floats = (p for p in self.hf.parameters() if p.is_floating_point())  # quantised weights are integers
        return next(floats) if table is None else table.weight

    @property
    def start(self) -> int:
        """The id of the token with which the decoder of an encoder–decoder model starts."""
        known = (getattr(self.hf.config, f"{n}_token_id", None) for n in ("decoder_start", "bos", "pad"))
        return next((n for n in known if isinstance(n, int)), 0)

    @property
    def patches(self) -> Patches | None:
        """How images become tokens: `patches.prefix` tokens, `patches.grid` (rows, columns), `patches.suffix` tokens;
        None without."""
        return next((part.patches for part in self.parts.values() if part.patches is not None), None)

    @property
    def blocks(self) -> list[int]:
        """The layer numbers of all blocks of this part, those without attention too."""
        return sorted({*self.layers, *(block.layer for block in self.stack)})

    @property
    def other_attention(self) -> list[str]:
        """Attention in this part's blocks that other parts read, in words: cross-attention beside a decoder's own."""
        if self.part_name not in self._other_attention:
            own = set(self.parts[self.part_name].modules)
            found = [
                Mixer(block.layer, step.path, step.name)
                for block in self.stack
                for step in block.steps
                if step.kind == "attention" and self.hf.get_submodule(step.path) not in own
            ]
            self._other_attention[self.part_name] = named(found)
        return self._other_attention[self.part_name]

    @property
    def beside(self) -> list[str]:
        """The other parts whose attention stands in this part's blocks: cross-attention, or the decoder's own."""
        inside = {m for block in self.stack for m in self.hf.get_submodule(block.path).modules()}
        return [
            name for name, part in self.parts.items() if name != self.part_name and inside & set(part.modules)
        ]

    @property
    def mixers(self) -> tuple[Mixer, ...]:
        """The modules of this part's blocks that mix positions and have no attention map."""
        return mixers_of(self.stack)

    def attention_module(self, layer: int) -> nn.Module:
        """The transformers module of one layer's attention."""
        if layer not in self._modules:
            raise ModelError(f"no attention in layer {layer}; the model has layers {self.layers}")
        return self._modules[layer]

    def to_strings(self, ids: Tensor | Iterable[int]) -> list[str]:
        """One string per token id: "‹E6 97›" for bytes that are no whole character, `#id` without a tokenizer."""
        if isinstance(ids, str) or not isinstance(ids, Iterable):
            raise PromptError(f"to_strings takes token ids, as model.to_tokens(text)[0]; got {ids!r:.60}")
        numbers = [int(i) for i in ids]
        if self.tokenizer is None:
            return [f"#{i}" for i in numbers]
        return [token_text(self.tokenizer, i) for i in numbers]

    def unknown_words(self, texts: str | Iterable[str]) -> list[str]:
        """The pieces of the texts that become the tokenizer's unknown token, in order, without repeats."""
        unknown = getattr(self.tokenizer, "unk_token_id", None)
        if unknown is None or not getattr(self.tokenizer, "is_fast", False):
            return []
        found: dict[str, None] = {}
        for text in [texts] if isinstance(texts, str) else texts:
            read = encoding(self.tokenizer, text, return_offsets_mapping=True)
            for token, (begin, end) in zip(read["input_ids"], read["offset_mapping"], strict=True):
                if token == unknown and end > begin:
                    found[text[begin:end]] = None
        return list(found)

    def refuse_read_only(self, what: str) -> None:
        if self.read_only:
            raise EditError(f"the heads of {self.name} {what}: {self.read_only}")


def _listed(numbers: set[int], last: str) -> str:
    """ "4", "2 and 4", "1, 2 and 4"."""
    *some, final = map(str, sorted(numbers))
    return f"{', '.join(some)}{last}{final}" if some else final
