"""The methods of `HookedModel` that TransformerLens code uses: `cfg`, `run_with_cache`, `run_with_hooks`.

With them TransformerLens' `patching` and `head_detector` accept a `HookedModel` in place of a bridge. Names of
activations are TransformerLens' (`names.py` lists them), and so are shapes: q and z [batch, position, head, d_head], k
and v the same per key–value head, scores and patterns [batch, head, query, key], the stream [batch, position, d_model].
Scores and patterns are dense; a `names_filter` without them builds none. TransformerLens itself is needed only for the
`ActivationCache` that `run_with_cache` returns, not with `return_cache_object=False`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from headwater.lens.errors import ModelError
from headwater.lens.models import blocks, inputs, norms
from headwater.lens.models.classes import logits_of
from headwater.lens.models.opened import Opened
from headwater.lens.models.weights import HeadWeights, head_weights
from headwater.lens.naming.tokens import Tokens
from headwater.lens.running.forward import forward
from headwater.lens.running.losses import next_token_losses
from headwater.lens.transformer_lens import names as transformer_lens_names
from headwater.lens.transformer_lens.run import Function, Run, Stop

Hooks = Iterable[tuple[str | Callable[[str], bool], Function]]
Positions = int | slice | tuple[int | None, ...] | Sequence[int]
UNLIMITED = 2**31 - 1  # n_ctx of a model without a limit


@dataclass(frozen=True)
class Config:
    """The configuration under TransformerLens' names; `n_key_value_heads` is None without grouped-query attention."""

    model_name: str
    n_layers: int
    n_heads: int
    n_key_value_heads: int | None
    n_ctx: int
    d_model: int
    d_head: int
    d_mlp: int | None
    d_vocab: int
    device: str
    dtype: torch.dtype
    act_fn: str | None
    normalization_type: str
    eps: float
    positional_embedding_type: str
    attn_only: bool = False
    final_rms: bool = False
    use_attn_result: bool = False
    use_split_qkv_input: bool = False
    use_attn_in: bool = False
    default_prepend_bos: bool = False


class TransformerLens(Opened):
    """The methods of `HookedModel` for code written for TransformerLens."""

    @property
    def cfg(self) -> Config:
        """The configuration under TransformerLens' names."""
        text = self.hf.config.get_text_config()
        norm = blocks.final_norm(self)
        centred = norm is not None and norms.takes_mean_out(norm, self.d_model)
        return Config(
            model_name=self.name, n_layers=max(self.blocks) + 1, n_heads=self.n_heads,
            n_key_value_heads=None if self.n_kv_heads == self.n_heads else self.n_kv_heads,
            n_ctx=self.context or UNLIMITED, d_model=self.d_model, d_head=self.d_head, d_mlp=_width(text),
            d_vocab=self.vocab, device=str(self.device), dtype=self.dtype,
            act_fn=next((v for n in ("activation_function", "hidden_act", "hidden_activation")
                         if isinstance(v := getattr(text, n, None), str)), None),
            normalization_type="LN" if centred else "RMS", eps=0.0 if norm is None else norms.epsilon(norm),
            positional_embedding_type="rotary" if transformer_lens_names.is_rotary(self) else "standard",
            final_rms=not centred,
        )  # fmt: skip

    @property
    def ln_final(self) -> nn.Module:
        """The norm between the last block and the language head, which TransformerLens' logit lens applies."""
        norm = blocks.final_norm(self)
        if norm is None:  # TransformerLens asks with hasattr
            raise AttributeError(f"{self.name} has no norm in front of its language head")
        return norm

    def hook_names(self) -> list[str]:
        """Every activation name of `run_with_cache` and `run_with_hooks`, in the order of a forward pass."""
        return list(transformer_lens_names.places(self))

    def weights(
        self, layer: int, *, fold: bool = False, centre: bool = False, expand: bool = False
    ) -> HeadWeights:
        """W_Q, W_K, W_V, W_O and their biases per head.

        lens/models/weights.py says what `fold`, `centre` and `expand` do.
        """
        return head_weights(self, layer, fold=fold, centre=centre, expand=expand)

    def run_with_hooks(
        self, given: Any, fwd_hooks: Hooks = (), bwd_hooks: Hooks = (), *, return_type: str | None = "logits",
        attention_mask: Any = None, grad: bool = False, prepend_bos: bool | None = None, **ignored: Any,
    ) -> Any:  # fmt: skip
        """One forward pass with hook functions: `function(tensor, hook=point)` returns a new tensor, or None to keep.

        `fwd_hooks` holds pairs (name, function); in place of a name a function from name to bool may select several.
        `return_type` is "logits", "loss" (mean next-token loss in nats), "both" or None. Functions in `bwd_hooks` get
        the gradient; they, or `grad=True`, turn gradients on. `reset_hooks_end` and `clear_contexts` are accepted and
        ignored: no hook outlives its run.
        """
        _refuse(ignored)
        forward, backward = _by_name(self, fwd_hooks), _by_name(self, bwd_hooks)
        places = [transformer_lens_names.check(self, n) for n in {**forward, **backward}]
        tokens = inputs.read(self, given, attention_mask, prepend_bos=prepend_bos)
        run = Run(self, places, len(tokens), forward=forward, backward=backward)
        return _run(self, run, tokens, return_type, grad or bool(backward))

    def run_with_cache(
        self, given: Any, return_cache_object: bool = True, remove_batch_dim: bool = False, *,
        names_filter: str | Iterable[str] | Callable[[str], bool] | None = None, return_type: str | None = "logits",
        attention_mask: Any = None, device: Any = None, pos_slice: Positions | None = None,
        stop_at_layer: int | None = None, incl_bwd: bool = False, grad: bool = False,
        prepend_bos: bool | None = None, **ignored: Any,
    ) -> tuple[Any, Any]:  # fmt: skip
        """One forward pass; returns (output, cache), with the named activations on `device`, at `pos_slice`.

        `pos_slice` is a position, a slice or its arguments as a tuple, or a list; the position axis stays.

        `names_filter=None` keeps every name but `hook_result`. `incl_bwd` runs backward from the loss and adds the
        gradients as "…_grad". Without `incl_bwd` or `grad` no gradient is tracked, unlike in TransformerLens.
        `stop_at_layer` ends the run before that layer and returns the residual stream in place of the logits.
        """
        _refuse(ignored)
        kept = transformer_lens_names.chosen(self, names_filter)
        stop = None
        if stop_at_layer is not None:
            layers = max(self.blocks) + 1
            at = stop_at_layer + layers if stop_at_layer < 0 else stop_at_layer
            kept = [n for n in kept if not n.startswith("ln_final") and (_layer(n) is None or _layer(n) < at)]  # type: ignore[operator]
            stop = f"blocks.{at}.hook_resid_pre" if at < layers else None
        known = transformer_lens_names.places(self)
        places = [known[n] for n in known if n in kept or n == stop]
        tokens = inputs.read(self, given, attention_mask, prepend_bos=prepend_bos)
        run = Run(
            self, places, len(tokens), keep=kept, gradients=incl_bwd, stop=stop,
            stored=lambda name, tensor: _positions(name, tensor, pos_slice).to(device or tensor.device),
        )  # fmt: skip
        kind = "loss" if incl_bwd else return_type
        output = _run(self, run, tokens, kind, grad or incl_bwd)
        if incl_bwd:
            output.backward()
        cache = run.cache | run.grads
        if remove_batch_dim:
            cache = {name: _only(tensor) for name, tensor in cache.items()}
        return output, _cache_object(cache, self, not remove_batch_dim) if return_cache_object else cache


def _run(model: TransformerLens, run: Run, tokens: Tokens, kind: str | None, grad: bool) -> Any:
    if kind not in ("logits", "loss", "both", None):
        raise ModelError(f"return_type is 'logits', 'loss', 'both' or None; got {kind!r}")
    try:
        with run.on():
            output = forward(model, tokens, grad)
    except Stop as stopped:
        return stopped.stream
    if run.missed:
        raise ModelError(f"{model.name}: {min(run.missed)} was not reached in this run; leave it out")
    if kind is None:
        return None
    if kind == "logits" and model.classes:
        return logits_of(output)
    if not model.has_lm_head:
        raise ModelError(f"{model.name} has no language head, so it gives no logits; use return_type=None")
    if kind == "logits":
        return output.logits
    losses, real = next_token_losses(output.logits, tokens)
    loss = losses[real].mean()
    return loss if kind == "loss" else (output.logits, loss)


def _by_name(model: TransformerLens, given: Hooks) -> dict[str, list[Function]]:
    found: dict[str, list[Function]] = {}
    for wanted, function in given:
        names = (
            [wanted]
            if isinstance(wanted, str)
            else [n for n in transformer_lens_names.places(model) if wanted(n)]
        )
        for name in names:
            found.setdefault(name, []).append(function)
    return found


def _refuse(options: Mapping[str, Any]) -> None:
    if unknown := [name for name in options if name not in ("reset_hooks_end", "clear_contexts")]:
        raise ModelError(
            f"{unknown[0]} is an option of TransformerLens that Headwater does not take; leave it out"
        )


def _layer(name: str) -> int | None:
    return int(name.split(".")[1]) if name.startswith("blocks.") else None


def _positions(name: str, tensor: Tensor, wanted: Positions | None) -> Tensor:
    """The tensor at some positions (axis 1, of scores and patterns axis 2); the axis stays, as in TransformerLens."""
    if wanted is None:
        return tensor
    if isinstance(wanted, tuple):  # TransformerLens reads a tuple as the arguments of a slice
        wanted = slice(*wanted)
    chosen = [wanted] if isinstance(wanted, int) else wanted
    return tensor[:, :, chosen] if name.endswith(("hook_pattern", "hook_attn_scores")) else tensor[:, chosen]


def _only(tensor: Tensor) -> Tensor:
    if tensor.shape[0] != 1:
        raise ModelError(f"remove_batch_dim is for one prompt; got {tensor.shape[0]}")
    return tensor[0]


def _width(text: Any) -> int | None:
    found = (getattr(text, name, None) for name in ("intermediate_size", "ffn_dim", "n_inner"))
    wide = next((value for value in found if isinstance(value, int)), None)
    return wide if wide is not None or not hasattr(text, "n_inner") else 4 * text.hidden_size


def _cache_object(cache: dict[str, Tensor], model: TransformerLens, batched: bool) -> Any:
    try:
        from headwater.lens.transformer_lens.cache import Cache
    except ImportError:
        raise ModelError(
            "an ActivationCache is TransformerLens' own; install headwater[transformer-lens], or give "
            "return_cache_object=False for a plain dictionary"
        ) from None
    return Cache(cache, model, has_batch_dim=batched)
