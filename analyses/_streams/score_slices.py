"""Attention scores as bilinear forms of the residual stream, `s = x̃ᵀ Ω ỹ`, split into orthogonal slices.

x̃ is the stream after the norm with a 1 appended, so that Ω = [W_Q; b_Q] R_i R_jᵀ [W_K; b_K]ᵀ includes the biases. R
are the rotations of rotary models; they are measured on the model itself. Ω has rank d_head at most and is never built:
its singular vectors come from two thin QR decompositions and an SVD of size d_head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from headwater.analyses._prompts.examples import Batch
from headwater.analyses._streams.component_graph import Wiring
from headwater.lens.model import HookedModel
from headwater.lens.models import blocks, norms
from headwater.lens.models.closeness import close_or_refuse, of_sums, rounding_mend
from headwater.lens.models.weights import head_weights
from headwater.lens.transformer_lens import names as transformer_lens_names

ROWS = 8  # unit queries in one run when rotations are measured


@dataclass(frozen=True, eq=False)
class Slices:
    """`Ω = Σ_k strength_k left_k right_kᵀ`: strength [slice] falls; left and right are [slice, d_model + 1]."""

    strength: Tensor
    left: Tensor
    right: Tensor

    def terms(self, x: Tensor, y: Tensor) -> Tensor:
        """The contribution of each slice to the score of a query's x̃ and a key's ỹ, [slice]."""
        return self.strength * (self.left @ x) * (self.right @ y)


def leading(values: Tensor, whole: float, share: float) -> Tensor:
    """Indices of the fewest largest `values` whose sum exceeds share·whole; of all positive ones if no sum does."""
    order = values.argsort(descending=True)
    enough = (values[order].cumsum(0) > share * whole).nonzero()
    count = int(enough[0]) + 1 if len(enough) else int((values > 0).sum())
    return order[:count]


def used(terms: Tensor, share: float) -> Tensor:
    """Indices of the slices that a score of either sign uses."""
    score = float(terms.sum())
    return leading(terms, score, share) if score >= 0 else leading(-terms, -score, share)


class Form:
    """The forms of one layer's heads, float64. `turns`: rotations [position, d_head, d_head], or None."""

    def __init__(self, model: HookedModel, layer: int, turns: Tensor | None) -> None:
        norm = blocks.block(model, layer).norm1
        self.centred = norm is not None and norms.takes_mean_out(norm, model.d_model)
        found = head_weights(model, layer, fold=True, centre=self.centred, expand=True)
        sides = [(found.W_Q, found.b_Q), (found.W_K, found.b_K)]
        self.query, self.key = (torch.cat([w, b[:, None]], 1).double().cpu() for w, b in sides)
        self.turns = turns
        self._known: dict[tuple[int, ...], Slices] = {}

    def scores(self, x: Tensor) -> Tensor:
        """`x̃_iᵀ Ω x̃_j` [head, query, key] of a prompt [position, d_model + 1]: scores before they are scaled."""
        q, k = torch.einsum("sd,hde->hse", x, self.query), torch.einsum("sd,hde->hse", x, self.key)
        if self.turns is not None:
            q, k = (torch.einsum("hse,sef->hsf", part, self.turns[: len(x)]) for part in (q, k))
        return q @ k.mT

    def slices(self, head: int, query: int, key: int) -> Slices:
        """The slices of a head; in a rotary model they depend on the positions of query and key."""
        place = (head,) if self.turns is None else (head, query, key)
        if place not in self._known:
            (q_basis, q_rest), (k_basis, k_rest) = (torch.linalg.qr(m[head]) for m in (self.query, self.key))
            turn = torch.eye(q_rest.shape[1], dtype=q_rest.dtype)
            if self.turns is not None:
                turn = self.turns[query] @ self.turns[key].mT
            left, strength, right = torch.linalg.svd(q_rest @ turn @ k_rest.mT)
            self._known[place] = Slices(strength, (q_basis @ left).mT, (k_basis @ right.mT).mT)
        return self._known[place]

    def keys_at(self, head: int, query: int, key: int, place: int) -> Tensor:
        """The right sides of a pair's slices for a key at another position, `place`: [slice, d_model + 1]."""
        parts = self.slices(head, query, key)
        if self.turns is None or place == key:
            return parts.right
        basis, rest = torch.linalg.qr(self.key[head])
        # from `place` to `key`; YaRN also scales, so the inverse is not the transpose
        turn = self.turns[place] @ torch.linalg.inv(self.turns[key])
        return (self.key[head] @ turn @ torch.linalg.pinv(rest) @ basis.mT @ parts.right.mT).mT


@dataclass(frozen=True, eq=False)
class Prompt:
    """One run of one prompt, float64: the nodes' outputs `said` [node, position, d_model], and by layer the stream x̃
    [position, d_model + 1], the divisor of the norm in front [position], and the patterns [head, query, key].
    """

    ids: Tensor  # [1, position], with further inputs
    said: Tensor
    x: dict[int, Tensor]
    scale: dict[int, Tensor]
    pattern: dict[int, Tensor]

    @property
    def length(self) -> int:
        """The number of tokens of the model's part."""
        return self.said.shape[1]

    def spoken(self, nodes: Any, layer: int, position: int, form: Form, constant: bool) -> Tensor:
        """The outputs of nodes at a position as a layer's heads read them, augmented: [node, d_model + 1]."""
        y = self.said[nodes, position]
        y = y - y.mean(-1, keepdim=True) if form.centred else y
        return torch.nn.functional.pad(y, (0, 1), value=float(constant)) / self.scale[layer][position]


class Forms:
    """The forms of every layer, and runs of prompts. AnalysisError where scores are not bilinear in the stream."""

    def __init__(self, model: HookedModel, prompts: Sequence[Tensor]) -> None:
        self.model = model
        kind = "kv" if model.n_kv_heads != model.n_heads else "head"
        self.wiring = Wiring(model, kind)
        longest = max(prompts, key=lambda row: row.shape[1])
        self.rotary = transformer_lens_names.is_rotary(model)
        turns = _turns(model, longest) if self.rotary else {}
        self.layers = {layer: Form(model, layer, turns.get(layer)) for layer in model.layers}

    def run(self, ids: Tensor) -> Prompt:
        """A run of one prompt, ids [1, position]."""
        model, known = self.model, transformer_lens_names.places(self.model)
        names = {layer: f"blocks.{layer}." for layer in model.layers}
        kinds = ["hook_resid_pre", "ln1.hook_normalized", "ln1.hook_scale", "attn.hook_pattern"]
        kinds += ["attn.hook_q", "attn.hook_k", "attn.hook_rot_q", "attn.hook_rot_k"] if self.rotary else []
        wanted = [start + kind for start in names.values() for kind in kinds if start + kind in known]
        with torch.no_grad():
            said = torch.stack(self.wiring.run(ids)[1])[:, 0].double().cpu()
            _, cache = model.run_with_cache(
                ids, return_cache_object=False, names_filter=wanted, return_type=None
            )
        cache = {name: tensor[0].double().cpu() for name, tensor in cache.items()}
        x, scale = {}, {}
        for layer, start in names.items():
            self._check_turns(layer, cache)
            stream = cache[f"{start}hook_resid_pre"]
            x[layer] = cache.get(f"{start}ln1.hook_normalized", stream)
            x[layer] = torch.nn.functional.pad(x[layer], (0, 1), value=1.0)
            length = cache.get(f"{start}ln1.hook_scale")
            scale[layer] = stream.new_ones(len(stream)) if length is None else length[:, 0]
        patterns = {layer: cache[f"{start}attn.hook_pattern"] for layer, start in names.items()}
        return Prompt(ids, said, x, scale, patterns)

    def _check_turns(self, layer: int, cache: dict[str, Tensor]) -> None:
        turns = self.layers[layer].turns
        for letter in "qk" if turns is not None else "":
            plain, turned = (cache[f"blocks.{layer}.attn.hook_{kind}{letter}"] for kind in ("", "rot_"))
            assert turns is not None
            expected = torch.einsum("she,sef->shf", plain, turns[: len(plain)])
            what = f"layer {layer} of {self.model.name} does more to its queries and keys than rotate them (a norm?)"
            then = f", so its scores are no form of the stream{rounding_mend(self.model)}"
            close_or_refuse(expected, turned, what, then, allowed=of_sums(self.model))


def _turns(model: HookedModel, ids: Tensor) -> dict[int, Tensor]:
    """The rotations of a rotary model's queries, [position, d_head, d_head] by layer: its results for unit queries."""
    size = model.d_head
    found: dict[int, list[Tensor]] = {layer: [] for layer in model.layers}

    def unit(rows: Tensor) -> Any:
        return lambda q, hook: rows[:, None, None].to(q).expand_as(q)

    def keep(q: Tensor, hook: Any) -> None:
        found[hook.layer()].append(q[:, :, 0].double().cpu())

    for rows in torch.eye(size).split(ROWS):
        hooks: list[Any] = []
        for layer in model.layers:
            hooks += [(f"blocks.{layer}.attn.hook_q", unit(rows)), (f"blocks.{layer}.attn.hook_rot_q", keep)]
        model.run_with_hooks(Batch(ids, [0]).copies(len(rows)).ids, hooks, return_type=None)
    return {layer: torch.cat(parts).movedim(0, 1) for layer, parts in found.items()}
