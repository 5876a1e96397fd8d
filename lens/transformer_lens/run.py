"""`Run`: one forward pass with hook functions at TransformerLens' names.

Names of modules become module hooks (`attention/module_hooks.py`) for the time of the run, in its context only. Names
inside attention are reached through `context.tapping`. Dense scores and patterns are built only in layers where their
names are used.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from headwater.kernels.attend import attend
from headwater.kernels.maps.attention_map import AttentionMap
from headwater.kernels.rules.rule import ScoreRule
from headwater.kernels.tiles.block import Block
from headwater.lens.attention import context, module_hooks
from headwater.lens.errors import ModelError
from headwater.lens.models import norms
from headwater.lens.models.linear import linear
from headwater.lens.models.opened import Opened

Kind = Literal["attention", "input", "entering", "output", "scale", "normalized", "features", "result"]


@dataclass(frozen=True, eq=False)
class Activation:
    """One activation name. `kind` says where it is taken: "attention" inside the attention function, the others at
    `module`: its "input", its "output", the "scale" or "normalized" value of a norm, its "features" split into `heads`,
    its input split so ("entering"), or the "result" of each head through its `weight`.
    """

    name: str
    kind: Kind
    module: nn.Module | None = None
    heads: Callable[[Tensor], Tensor] | None = None
    weight: Callable[[], Tensor] | None = None


class Point:
    """The `hook` argument of a function, as in TransformerLens: `name`, `layer()`, and the dict `ctx` for free use."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.ctx: dict[Any, Any] = {}

    def layer(self) -> int:
        return int(self.name.split(".")[1])


class Stop(Exception):
    """Raised to end a run at `stop_at_layer`; carries the residual stream out."""

    def __init__(self, stream: Tensor) -> None:
        super().__init__("stopped")
        self.stream = stream


NEGLIGIBLE = 1e-30  # scale of q·k beside given scores; 0 would make 0 · -inf = NaN in fused kernels
Function = Callable[..., Tensor | None]


class Run(context.Tap):
    """`places` are the activations in use, `forward` and `backward` the functions by name, `keep` the names to cache.

    `batch` is the number of prompts: some models flatten [batch, position] before an MLP.
    """

    def __init__(
        self, model: Opened, places: Sequence[Activation], batch: int, *,
        forward: dict[str, list[Function]] | None = None, backward: dict[str, list[Function]] | None = None,
        keep: Collection[str] = (), stored: Callable[[str, Tensor], Tensor] | None = None, gradients: bool = False,
        stop: str | None = None,
    ) -> None:  # fmt: skip
        self.model = model
        self.places = {place.name: place for place in places}
        self.batch = batch
        self.forward, self.backward = forward or {}, backward or {}
        self.keep = set(keep)
        self.stored = stored or (lambda name, tensor: tensor)
        self.gradients = gradients
        self.stop = stop
        self.missed = {place.name for place in places}
        self.cache: dict[str, Tensor] = {}
        self.grads: dict[str, Tensor] = {}
        self._points: dict[str, Point] = {}
        self._scored: tuple[Tensor, Tensor, ScoreRule] | None = None

    @contextlib.contextmanager
    def on(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for place in self.places.values():
                if place.module is not None:
                    stack.enter_context(self._on_module(place, place.module))
            stack.enter_context(context.tapping(self.model.key, self))
            yield

    def passing(self, name: str, given: Tensor) -> Tensor:
        """The tensor with which the model continues at this name: `given`, unless a function changed it."""
        found = given
        self.missed.discard(name)
        point = self._points.setdefault(name, Point(name))
        for function in self.forward.get(name, ()):
            found = found.clone() if found is given else found  # functions may write into what they get
            changed = function(found, hook=point)
            found = found if changed is None else changed
            if not isinstance(found, Tensor) or found.shape != given.shape:
                raise ModelError(
                    f"the function at {name} gave {_shape(found)}; it must give a tensor {list(given.shape)} or None"
                )
        if self.backward.get(name) or (self.gradients and name in self.keep):
            found = self._watched(name, found, point)
        if name in self.keep:
            self.cache[name] = self.stored(name, found.detach())
        if name == self.stop:
            raise Stop(found)
        return found

    def _watched(self, name: str, tensor: Tensor, point: Point) -> Tensor:
        # a new tensor, so that the rest of the run depends on it and its gradient hook is called
        tensor = tensor.clone() if tensor.requires_grad else tensor.detach().requires_grad_()
        for function in self.backward.get(name, ()):
            tensor.register_hook(lambda grad, function=function: function(grad, hook=point))
        if self.gradients and name in self.keep:
            tensor.register_hook(
                lambda grad: self.grads.update({f"{name}_grad": self.stored(name, grad.detach())})
            )
        return tensor

    # --- inside of the attention function

    def _wants(self, layer: int, what: str) -> str | None:
        place = self.places.get(f"blocks.{layer}.attn.hook_{what}")
        return place.name if place is not None and place.kind == "attention" else None

    def entering(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if name := self._wants(layer, "rot_q"):
            q = self.passing(name, q.transpose(1, 2)).transpose(1, 2)
        if name := self._wants(layer, "rot_k"):
            k = self.passing(name, k.transpose(1, 2)).transpose(1, 2)
        return q, k, v

    def scoring(self, layer: int, q: Tensor, k: Tensor, rule: ScoreRule) -> ScoreRule:
        name = self._wants(layer, "attn_scores")
        if name is not None:
            scores = _scores(q, k, rule)
            least = torch.finfo(
                scores.dtype
            ).min  # the value of masked scores in eager attention and in a bridge
            shown = scores.masked_fill(scores == float("-inf"), least)
            if (found := self.passing(name, shown)) is not shown:
                rule = _given_scores(rule, found.masked_fill(found <= least / 2, float("-inf")), scores)
        self._scored = (q, k, rule)
        return rule

    def weighing(self, layer: int, z: Tensor, map: AttentionMap, v: Tensor) -> Tensor:
        name = self._wants(layer, "pattern")
        if name is None:
            return z
        assert self._scored is not None
        q, k, rule = self._scored
        tracked = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad)
        weights = (_differentiable(q, k, rule, map) if tracked else map.dense()).to(v.dtype)
        found = self.passing(name, weights)
        if found is weights:
            return z
        return found.to(v) @ v.repeat_interleave(found.shape[1] // v.shape[1], 1)

    def leaving(self, layer: int, z: Tensor) -> Tensor:
        name = self._wants(layer, "z")
        return z if name is None else self.passing(name, z.transpose(1, 2)).transpose(1, 2)

    # --- at modules

    def _runs(self) -> bool:
        """Whether this is the innermost run: a hook function may start another run of the model."""
        return context.current_tap(self.model.key) is self

    def _on_module(self, place: Activation, module: nn.Module) -> contextlib.AbstractContextManager[None]:
        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if not self._runs():
                return None
            given = module_hooks.hidden_states(args, kwargs)
            found = self._before(place, given)
            return None if found is given else module_hooks.with_hidden_states(args, kwargs, found)

        def after(owner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            if not self._runs():
                return None
            given = module_hooks.first_output(output)
            found = self._after(place, owner, args, given)
            return None if found is given else module_hooks.with_first_output(output, found)

        if place.kind in ("input", "entering"):
            return module_hooks.on(module, before=before)
        return module_hooks.on(module, after=after)

    def _before(self, place: Activation, given: Tensor) -> Tensor:
        if place.kind == "input":
            return self._passing_rows(place.name, given)
        assert place.heads is not None
        rows = given if given.dim() == 3 else given.unflatten(0, (self.batch, -1))
        seen = place.heads(rows)
        found = self.passing(place.name, seen)
        return given if found is seen else found.reshape(given.shape)

    def _after(self, place: Activation, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        if place.kind == "output":
            if place.name == "hook_pos_embed":  # one table serves every prompt
                output = output.expand(self.batch, -1, -1)
            return self._passing_rows(place.name, output)
        if place.kind == "features":
            assert place.heads is not None
            seen = place.heads(output)
            if (found := self.passing(place.name, seen)) is seen:
                return output
            changed = output.clone()
            place.heads(changed).copy_(found)
            return changed
        if place.kind == "result":
            assert place.heads is not None
            assert place.weight is not None
            parts = torch.einsum("bshe,hed->bshd", place.heads(args[0]), place.weight().to(args[0]))
            if (found := self.passing(place.name, parts)) is parts:
                return output
            bias = linear(module).bias
            return found.sum(2) if bias is None else found.sum(2) + bias
        return self._in_norm(place, module, args[0], output)

    def _passing_rows(self, name: str, given: Tensor) -> Tensor:
        if given.dim() != 2:
            return self.passing(name, given)
        rows = given.unflatten(0, (self.batch, -1))
        found = self.passing(name, rows)
        return given if found is rows else found.flatten(0, 1)

    def _in_norm(self, place: Activation, norm: nn.Module, given: Tensor, output: Tensor) -> Tensor:
        width = given.shape[-1]
        high = given if given.dtype == torch.float64 else given.float()
        with module_hooks.off():  # these call the norm on probes, which the hook functions must not see
            takes_mean_out = norms.takes_mean_out(norm, width)
            gain, bias = (f(norm, width).to(high) for f in (norms.norm_gain, norms.norm_bias))
        centred = high - high.mean(-1, keepdim=True) if takes_mean_out else high
        scale = (centred.square().mean(-1, keepdim=True) + norms.epsilon(norm)).sqrt()
        seen = scale if place.kind == "scale" else centred / scale
        if (found := self._passing_rows(place.name, seen)) is seen:
            return output
        normalised = centred / found if place.kind == "scale" else found
        return (normalised * gain + bias).to(output.dtype)


def _scores(q: Tensor, k: Tensor, rule: ScoreRule) -> Tensor:
    """The dense scores of a layer, [batch, head, query, key], -inf on masked pairs."""
    if rule.normaliser is not None and rule.normaliser.name in ("linear", "lssa"):
        raise ModelError(
            f"the {rule.normaliser.name} normaliser makes weights of other products than scaled q·k; it has no "
            "hook_attn_scores"
        )
    whole = Block(slice(0, q.shape[0]), torch.arange(q.shape[1]), slice(0, q.shape[2]), slice(0, k.shape[2]))
    return rule.scores(q, k, whole)


def _given_scores(rule: ScoreRule, scores: Tensor, before: Tensor) -> ScoreRule:
    """A rule that gives these scores. If a function made a masked pair visible, the mask keeps only the padding."""
    mask = rule.mask
    if bool(((before == float("-inf")) & (scores > float("-inf"))).any()):
        mask = dataclasses.replace(mask, left=None, right=None, extra=None, documents=None)
    return dataclasses.replace(
        rule, scale=NEGLIGIBLE, mask=mask, softcap=None, bias=scores, edits=(), alibi=None
    )


def _differentiable(q: Tensor, k: Tensor, rule: ScoreRule, map: AttentionMap) -> Tensor:
    """The dense weights of a layer with gradients, which maps do not carry: attention with unit vectors as v."""
    unit = torch.eye(k.shape[2], dtype=q.dtype, device=q.device).expand(*k.shape[:2], -1, -1)
    return attend(q, k, unit, rule, [step.edit for step in map.steps], "blocked")[0]


def _shape(found: Any) -> str:
    return str(list(found.shape)) if isinstance(found, Tensor) else type(found).__name__
