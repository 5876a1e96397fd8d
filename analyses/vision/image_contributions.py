"""Image contributions: what each layer, head and patch writes directly into the embedding of a picture.

Gandelsman, Efros & Steinhardt 2024 (arXiv 2310.05916), section 3. The stream of the class token is a sum, the final
norm keeps its scale of the run, and the projection is linear, so the embedding is a sum over heads and patches too.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from headwater.analyses._catalogue.analysis import analysis
from headwater.analyses._catalogue.settings import BatchSize
from headwater.analyses._prompts.examples import Examples
from headwater.analyses._prompts.pictures import captions_of, embeddings_of
from headwater.analyses._streams.image_run import Mean, Per, Pictures
from headwater.lens.model import HookedModel


@analysis
def image_contributions(
    model: HookedModel,
    examples: Examples,
    texts: Annotated[
        str | Path | Sequence[str] | None,
        "captions to which contributions are turned, or a file with one a line",
    ] = None,
    per: Annotated[Per, "sum over patches, over heads, or over neither"] = "head",
    mean: Annotated[
        Mean, "each part loses its own mean, or all share that of the stream, as released"
    ] = "own",
    batch_size: BatchSize = 16,
) -> xr.Dataset:
    """`c = P·(g ⊙ (x - mean(x)))/(s·|M|)` of every part x of the class token's stream, M the picture's embedding.

    `s` is the scale of the final norm in the run, g its gain, P the projection. `contribution` is [batch, layer, head,
    feature] for `per="head"`, where a head's x is `Σ_i A_cls,i v_i W_O`; [batch, key, feature] for "patch", summed over
    heads and layers, the class token being the first key; [batch, layer, head, key, feature] for "head_patch", where
    memory is that of the result. `rest` [batch, term, feature] has the embedding, MLPs and biases. Both add up to
    `total` [batch, feature], the model's own embedding at length 1: the attribute `closure` is the largest difference,
    and a model that does not add up is refused. With `texts` the last axis is `text`: contributions to the cosine with
    each.

    Of a model with classes `total` are its logits (axis `class`), and of a tower without a head the normed state of its
    class token. A tower without a class token is refused (SigLIP, whose pooling is an attention behind the stream).
    `mean="shared"` reproduces the released numbers: the mean of the stream and the biases are divided among embedding,
    attentions and MLPs, and within an attention among heads and patches. Both sums are the same.

    Question: What does each head and patch write directly into the embedding of a picture?
    Unit: cosine with a text or coordinate of a vector of length 1; logit of a class; coordinate of a state.
    Source: Gandelsman, Efros & Steinhardt 2024, arXiv:2310.05916; checked against the authors' code.
    Cost: one forward pass; per layer a product of values and d_head × outputs numbers for each head.
    Not for: what a head does by way of later layers (patch); models whose norms stand behind the sum (refused).

    >>> import headwater as hw, torch, transformers
    >>> sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    >>> config = transformers.ViTConfig(image_size=32, patch_size=8, **sizes)
    >>> model = hw.load(transformers.ViTForImageClassification(config).eval())
    >>> found = hw.analyses.image_contributions(model, torch.rand(3, 3, 32, 32), per="patch")
    >>> found.contribution.dims, found.contribution.shape, found.closure < 1e-5
    (('batch', 'key', 'class'), (3, 17, 2), True)
    """
    pictures = Pictures.of(model, examples, batch_size)
    captions = None if texts is None else captions_of(texts, "texts")
    towards = None if captions is None else embeddings_of(model, captions)
    rows: dict[int, tuple[Tensor, ...]] = {}
    closure, terms = 0.0, []
    for places, run in pictures.runs():
        found, others = run.parts(towards, per, mean)
        rest, terms = torch.stack(list(others.values()), 1), list(others)
        summed = found.flatten(1, -2).sum(1) + rest.sum(1)
        closure = max(closure, run.hold(summed, towards))
        total = run.total if towards is None else run.total @ towards.to(run.total).T
        rows |= dict(zip(places, zip(found.cpu(), rest.cpu(), total.cpu(), strict=True), strict=True))
    found, rest, total = (torch.stack([rows[n][k] for n in range(len(rows))]).numpy() for k in range(3))
    last = "text" if captions else "class" if pictures.tower.classes else "feature"
    dims = {"head": ("layer", "head"), "patch": ("key",), "head_patch": ("layer", "head", "key")}[per]
    return xr.Dataset(
        {
            "contribution": (("batch", *dims, last), found),
            "rest": (("batch", "term", last), rest),
            "total": (("batch", last), total),
        },
        coords=_coordinates(pictures, dims, last, captions, terms, total.shape[1]),
        attrs={"closure": closure},
    )


def _coordinates(
    pictures: Pictures, dims: Sequence[str], last: str, captions: list[str] | None, terms: list[str], outputs: int
) -> dict[str, object]:  # fmt: skip
    """The labels of all axes of a result."""
    tower = pictures.tower
    found: dict[str, object] = {"batch": np.arange(len(pictures)), "term": terms}
    if "layer" in dims:
        found |= {"layer": tower.layers, "head": np.arange(tower.n_heads)}
    if "key" in dims:
        found |= pictures.keys()
    names = list(tower.classes) if last == "class" and tower.classes else []
    found[last] = captions or (names if len(names) == outputs else np.arange(outputs))
    return found
