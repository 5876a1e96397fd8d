"""TransformerLens' `ActivationCache` of a Headwater model, whose sums are held to the stream.

TransformerLens takes a block for attention and an MLP. Where a block holds anything else (a mixer, no attention, a part
that is not added as it is), its tools leave that out or stop with a missing key; here one line says so. Only
`face.py` imports this file, and only where TransformerLens is installed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from torch import Tensor

from headwater.lens.errors import ModelError
from headwater.lens.models.closeness import close_or_refuse, rounding_mend
from headwater.lens.models.stack import named
from transformer_lens import ActivationCache

SUMS = ("decompose_resid", "get_full_resid_decomposition", "stack_head_results", "compute_head_results",
        "stack_neuron_results")  # fmt: skip
OTHERS = (
    "accumulated_resid",
    "apply_ln_to_stack",
    "get_neuron_results",
    "logit_attrs",
    "stack_activation",
    "logit_lens",
    "ssm_layers",
    "compute_ssm_effective_attention",
    "compute_ssm_state",
)
CLOSE, COARSE = 1e-3, 5e-2  # allowed between a stream and its sum, in float32, and in 16 bits
INSTEAD = "analyses.direct_logit_attribution takes the stream apart with everything that writes into it"


class Cache(ActivationCache):
    """The cache that `run_with_cache` returns."""

    model: Any

    def hold_sum(self, layer: int | None) -> None:
        """ModelError unless embeddings, attention and MLPs below a layer add up to the stream there, as far as kept."""
        known, count = self.cache_dict, self.model.cfg.n_layers
        place = count if layer is None else layer + count + 1 if layer < 0 else layer
        here = f"blocks.{place}.hook_resid_pre" if place < count else f"blocks.{count - 1}.hook_resid_post"
        terms = [f"blocks.{n}.hook_{kind}_out" for n in range(place) for kind in ("attn", "mlp")]
        wanted = [*(name for name in ("hook_embed", "hook_pos_embed") if name in known), *terms]
        if here in known and wanted and all(name in known for name in wanted):
            total: Tensor = sum(known[name].float() for name in wanted)  # type: ignore[assignment]
            close_or_refuse(
                total, known[here], f"embeddings, attention and MLPs of {self.model.name} do not add up to {here}",
                f"; {INSTEAD}{rounding_mend(self.model)}",
                allowed=COARSE if known[here].element_size() < 4 else CLOSE, error=ModelError,
            )  # fmt: skip


def _told(name: str, tool: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(tool)
    def told(self: Cache, *args: Any, **kwargs: Any) -> Any:
        model = self.model
        if name in SUMS:
            if model.mixers:
                others = " and ".join(named(model.mixers))
                raise ModelError(
                    f"{name} knows attention and MLPs alone, and {model.name} holds {others} too; {INSTEAD}"
                )
            if name in SUMS[:2]:
                layer = kwargs.get("layer", args[0] if args else None)
                self.hold_sum(layer if isinstance(layer, int) else None)
        try:
            return tool(self, *args, **kwargs)
        except KeyError as error:
            raise ModelError(
                f"{name} needs {error.args[0]}, which is not in this cache: {model.name} has no such activation, or "
                f"names_filter, stop_at_layer or the default, which leaves hook_result out, did not keep it; {INSTEAD}"
            ) from None
        except (AttributeError, AssertionError, NotImplementedError) as error:
            raise ModelError(
                f"{name} asks {model.name} for what only TransformerLens' own models have ({error!s:.80}); keep "
                f"hook_result with names_filter=lambda name: True where heads are asked for; {INSTEAD}"
            ) from None

    return told


for _name in (*SUMS, *OTHERS):
    setattr(Cache, _name, _told(_name, getattr(ActivationCache, _name)))
