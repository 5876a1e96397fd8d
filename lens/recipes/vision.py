"""Recipes for models that read images: redistribution from visual sinks (VAR), and the channels of these.

Each runs the model on the given prompt and returns edits with the positions or heads that it found there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from headwater.lens.edits.base import Edit
from headwater.lens.edits.massive import RedistributeMassive, check_dimensions
from headwater.lens.edits.weights import Redistribute
from headwater.lens.errors import EditError
from headwater.lens.model import HookedModel
from headwater.lens.naming.positions import Positions
from headwater.lens.recipes.image_tokens import image_tokens, require_followed
from headwater.lens.records import sinks


def visual_redistribution(
    model: HookedModel, prompt: Any, *, p: float = 0.6, rho: float = 0.5, least: float = 0.2, tau: float = 20.0,
    dimensions: Sequence[int] | None = None, image: Positions = "image",
    sinks_of: Literal["plain run", "edited run"] = "plain run", **more: Any,
) -> list[Edit]:  # fmt: skip
    """VAR (Kang et al., ICLR 2025): move attention from sinks to the image tokens that are not sinks.

    A token is a sink of a layer if max over `dimensions` of |x_d| / sqrt(mean x² + 1e-6) > tau, where x is the stream
    entering the layer. A row after the image is image-centric if Σ(visual sinks) / Σ(image) ≤ rho and Σ(image) ≥ least.
    In such rows the weights on all sinks are multiplied by p, and the freed weight goes to the other image tokens in
    proportion. This is done in layers 2 to the last but one, where they have a visual sink; the authors' flag for the
    last layer is not read by their code, which edits it too. With `sinks_of="plain run"` the sinks are those of this
    prompt without edits, and the edits are for this prompt only. With "edited run" they are looked for as the authors'
    code does, layer by layer while the edited run goes on (`RedistributeMassive`): the one edit is then for any prompt,
    and from the second edited layer on the sinks may be others. `dimensions` are the model's massive activations
    ({1415, 2533} in LLaMA-2-7B); by default `massive_dimensions` finds them. Checked against the authors' code, which
    adds 1e-6 to every image weight, while this adds it once.

    >>> import torch, transformers
    >>> import headwater as hw
    >>> from headwater.lens.loading import zoo
    >>> config = zoo.FAMILIES["llava"].config
    >>> config = config | {"text_config": config["text_config"] | {"num_hidden_layers": 4}}
    >>> _ = torch.manual_seed(0)
    >>> model = hw.load(transformers.LlavaForConditionalGeneration(transformers.LlavaConfig(**config)).eval())
    >>> prompt = zoo.inputs("llava", lengths=(11,))  # input_ids, attention_mask, pixel_values
    >>> ids, pixels = prompt["input_ids"], prompt["pixel_values"]
    >>> edits = hw.recipes.visual_redistribution(model, ids, pixel_values=pixels, dimensions=[0], tau=0.5)
    >>> [edit.layers for edit in edits]  # layers 2 to the last but one
    [2]
    """
    if not isinstance(tau, int | float):
        raise EditError(f"visual_redistribution: tau is a number; got {tau!r}")
    tokens = model.to_tokens(prompt, **more)
    picked = image_tokens(model, tokens, image)
    require_followed(model, tokens, picked)
    if model.n_layers < 4:
        raise EditError(
            f"visual_redistribution edits layers 2 to the last but one, and {model.name} has {model.n_layers}; "
            "take a model of four layers or more, or RedistributeMassive with layers="
        )
    if dimensions is None:
        dimensions = massive_dimensions(model, tokens, tau=tau)
    check_dimensions(dimensions, model.d_model)
    if sinks_of == "edited run":
        inner = [layer for place, layer in enumerate(model.layers[:-1]) if place >= 2]
        return [RedistributeMassive(list(dimensions), p, tau, rho, least, image, layers=inner)]
    if sinks_of != "plain run":
        raise EditError(f"visual_redistribution: sinks_of is 'plain run' or 'edited run'; got {sinks_of!r}")
    record = model.record(tokens, statistics=(), keep=("residual",))
    found: list[Edit] = []
    for place, layer in enumerate(model.layers[:-1]):
        if place < 2:
            continue
        massive = (sinks.massive(record.residual(layer), dimensions) > tau).cpu() & tokens.mask.cpu()
        for row, real in enumerate(tokens.mask.cpu()):
            first = int(real.long().argmax())
            visual, others = massive[row] & picked[row], picked[row] & ~massive[row]
            if not visual.any() or not others.any():
                continue
            inside = picked[row].nonzero()[:, 0]
            of, within = _listed(visual, first), _listed(picked[row], first)
            where = {"of": of, "within": within, "most": rho, "least": least}
            found.append(Redistribute(
                keys=_listed(massive[row], first), keep=p, to=_listed(others, first), layers=layer,
                queries=slice(int(inside[-1]) - first + 1, None), where=where,
                rows="all" if len(picked) == 1 else [row],
            ))  # fmt: skip
    return found


def massive_dimensions(model: HookedModel, prompt: Any, *, tau: float = 20.0) -> list[int]:
    """Residual dimensions with |x_d| / rms(x) > tau on the first token, in some middle layer; at most eight.

    The first token is run by itself, without an image, as in VAR's code (Kang et al., ICLR 2025).

    >>> import headwater as hw
    >>> model = hw.load("tasks-4l")
    >>> hw.recipes.massive_dimensions(model, "Mary", tau=3.0)
    [166, 209]
    """
    tokens = model.to_tokens(prompt)
    first = int(tokens.mask[0].long().argmax())
    alone = model.to_tokens(tokens.ids[:1, first : first + 1])
    record = model.record(alone, statistics=(), keep=("residual",))
    size = sinks.massive_sizes(torch.stack([record.residual(layer)[0, 0].float() for layer in record.layers]))
    dimensions = sinks.massive_dimensions(size, tau)
    if not dimensions:
        raise EditError(
            f"{model.name} has no massive activation on its first token: the largest is {float(size.max()):.1f} "
            f"times the root mean square, tau is {tau:g}; give dimensions= or a lower tau"
        )
    return dimensions


def _listed(flags: Tensor, first: int) -> list[int]:
    """Positions counted from the first real token."""
    return [n - first for n in flags.nonzero()[:, 0].tolist()]
