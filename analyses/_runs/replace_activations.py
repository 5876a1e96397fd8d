"""Forward passes in which chosen cells of a model's activations are replaced: copies of the prompts, one cell in each.

Activations have TransformerLens' names (lens/transformer_lens/names.py). Queries, keys and values are replaced at the
input of attention, [batch, head, position, d], after rotary embeddings, where keys and values can also be set for one
query head alone.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from headwater.analyses._prompts.examples import output_in
from headwater.lens.attention.standing_in import standing_in
from headwater.lens.errors import AnalysisError
from headwater.lens.models import inputs
from headwater.lens.models.opened import Opened
from headwater.lens.models.signature import compares
from headwater.lens.naming.tokens import Tokens
from headwater.lens.running import prefix_cache
from headwater.lens.transformer_lens import names
from headwater.lens.transformer_lens.run import Function, Run

Parts = dict[str, Tensor]  # "q", "k", "v" of one layer
Per = Literal["query_head", "kv_head"]


class Swap(Run):
    """`forward` are functions by activation name; `attention` by layer: q, k and v → q, k and v, also with more key
    heads.

    After the run `cache` holds the activations in `keep`, and `seen` the q, k and v of the layers in `parts`, both with
    the changes. A run with `stop` ends at that activation, which must be in use, with `Stop`.
    """

    def __init__(
        self, model: Opened, batch: int, *, forward: Mapping[str, Function] | None = None,
        attention: Mapping[int, Callable[[Parts], Parts]] | None = None, keep: Collection[str] = (),
        parts: Collection[int] = (), stop: str | None = None,
    ) -> None:  # fmt: skip
        forward = forward or {}
        places = [names.check(model, name) for name in dict.fromkeys((*forward, *keep))]
        super().__init__(
            model, places, batch, forward={name: [function] for name, function in forward.items()}, keep=keep,
            stop=stop,
        )  # fmt: skip
        self.attention = attention or {}
        self.parts = set(parts)
        self.seen: dict[int, Parts] = {}

    def entering(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().entering(layer, q, k, v)
        found = {"q": q, "k": k, "v": v}
        if layer in self.attention:
            found = self.attention[layer](found)
        if layer in self.parts:
            self.seen[layer] = {name: tensor.detach() for name, tensor in found.items()}
        return found["q"], found["k"], found["v"]

    def logits(
        self, ids: Tensor, position: int | None, past: prefix_cache.Cache | None = None, tokens: Tensor | None = None
    ) -> Tensor:  # fmt: skip
        """What `outputs_of` gives in this run: logits [batch, position, vocab] of all positions or of `position`, and
        of all tokens or of `tokens` where the head allows it. `past` holds the keys and values of earlier positions and
        receives the new ones.
        """
        hf = self.model.hf
        known = inspect.signature(hf.forward).parameters
        given: dict[str, object] = {"input_ids": ids.as_subclass(Tensor).to(self.model.device)}
        if isinstance(ids, Tokens):
            given = inputs.arguments(self.model, ids)
        more: dict[str, object] = {"use_cache": False} if "use_cache" in known else {}
        if past is not None:
            more = {"use_cache": True, "past_key_values": past}
        if position is not None and "logits_to_keep" in known:
            more["logits_to_keep"] = torch.tensor([position], device=self.model.device)
        if not (self.model.has_lm_head or self.model.classes or compares(hf)):
            more["output_hidden_states"] = True
        with self.on(), torch.no_grad(), _narrowed(self.model, tokens):
            found = output_in(self.model, hf(**{**given, **more}))
        if self.missed:
            raise AnalysisError(
                f"{self.model.name}: {min(self.missed)} was not reached, so it can not be patched"
            )
        return found if position is None or found.shape[1] == 1 else found[:, position, None]


def per_head(model: Opened, part: str, per: Per | None) -> bool:
    """Whether `per` selects a query head's own copy of keys or values, not the head that a group shares."""
    if part == "q":
        if per == "kv_head" and model.n_kv_heads != model.n_heads:
            raise AnalysisError(
                f"queries are not shared in {model.name}; per='kv_head' is for keys and values"
            )
        return False
    if per is None and model.n_kv_heads != model.n_heads:
        group = model.n_heads // model.n_kv_heads
        raise AnalysisError(
            f"{group} query heads of {model.name} share one head of {part}; say which is patched: per='kv_head' for "
            "all of the group, per='query_head' for one head's view of it"
        )
    return per == "query_head" and model.n_kv_heads != model.n_heads


def expanded(tensor: Tensor, heads: int) -> Tensor:
    """Keys or values [batch, kv head, …] repeated for every query head, [batch, head, …]."""
    return tensor.repeat_interleave(heads // tensor.shape[1], 1)


def narrow_head(model: Opened) -> nn.Linear | None:
    """The language head if it is a plain linear layer, of which single rows can be computed; else None."""
    head = model.hf.get_output_embeddings()
    return head if type(head) is nn.Linear and "forward" not in vars(head) else None


@contextlib.contextmanager
def _narrowed(model: Opened, tokens: Tensor | None) -> Iterator[None]:
    head = None if tokens is None else narrow_head(model)
    if head is None:
        yield
        return
    weight, bias = head.weight[tokens], None if head.bias is None else head.bias[tokens]
    with standing_in({head: lambda hidden: nn.functional.linear(hidden, weight, bias)}):
        yield
