"""Which branches of guidance stand in a batch that a pipeline gives its denoiser, and in which order."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from headwater.lens.errors import PromptError
from headwater.lens.running.denoising import CONDITIONAL, PERTURBED, UNCONDITIONAL

LATENTS = ("sample", "hidden_states")
OWN_ORDER = ("StableCascade", "Wuerstchen", "Lumina")  # pipelines that put their branches in another order


def runs_one_by_one(pipeline: Any) -> bool:
    """Whether a pipeline calls its denoiser once for each branch, the conditional one first: its code then marks the
    calls "cond" and "uncond" for caches."""
    code = getattr(inspect.unwrap(inspect.getattr_static(pipeline, "__call__", len)), "__code__", None)
    return code is not None and "cache_context" in code.co_names and "uncond" in code.co_consts


def branches_of(pipeline: Any, module: nn.Module, bound: Mapping[str, Any]) -> tuple[str, ...]:
    """The branches of one batch, in the order of its rows; `bound` are the arguments of the denoiser.

    A batch with guidance holds the same latents for each branch; without such copies it is conditional alone.
    PromptError for pipelines whose order is not known.
    """
    if (halves := _of_classes(module, bound)) is not None:
        return halves
    guides = getattr(pipeline, "do_classifier_free_guidance", None)
    perturbs = bool(getattr(pipeline, "do_perturbed_attention_guidance", False))
    found = (UNCONDITIONAL,) if guides or (guides is None and not perturbs) else ()
    found = (*found, CONDITIONAL, *((PERTURBED,) if perturbs else ()))
    latents = next((bound[name] for name in LATENTS if isinstance(bound.get(name), Tensor)), None)
    own = type(pipeline).__name__.startswith(OWN_ORDER) or hasattr(pipeline, "image_guidance_scale")
    if own and any(_copies(latents, count) for count in (2, 3)):
        raise PromptError(
            f"{type(pipeline).__name__} has branches of its own; name them, in the order of the batch, with "
            "model.sampling(branches=…)"
        )
    return found if _copies(latents, len(found)) else (CONDITIONAL,)


def _copies(latents: Tensor | None, count: int) -> bool:
    """Whether a batch holds the same rows `count` times."""
    if latents is None or len(latents) % count:
        return False
    first, *others = latents.chunk(count)
    return all(torch.equal(first, other) for other in others)


def _of_classes(module: nn.Module, bound: Mapping[str, Any]) -> tuple[str, ...] | None:
    """The branches of a batch that is conditioned on classes: the number behind the last class means none."""
    labels, none = bound.get("class_labels"), dict(getattr(module, "config", {})).get("num_embeds_ada_norm")
    if not isinstance(labels, Tensor) or labels.dim() != 1 or none is None:
        return None
    empty = (labels == none).tolist()
    half = len(empty) // 2
    return (
        (CONDITIONAL, UNCONDITIONAL) if half and empty == [False] * half + [True] * half else (CONDITIONAL,)
    )
