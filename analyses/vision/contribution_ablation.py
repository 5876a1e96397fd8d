"""Contribution ablation: how much of zero-shot accuracy each part's direct contribution carries.

Gandelsman, Efros & Steinhardt 2024 (arXiv 2310.05916), sections 3 and 4: parts' contributions are replaced by their
mean over pictures, or by what a few captions rebuild of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from headwater.analyses._catalogue.analysis import analysis
from headwater.analyses._catalogue.settings import BatchSize, Bounds, Draws, Seed
from headwater.analyses._measures.bootstrap import intervals
from headwater.analyses._prompts.examples import Examples
from headwater.analyses._prompts.pictures import captions_of, embeddings_of
from headwater.analyses._streams.image_run import Pictures
from headwater.analyses._streams.text_spans import projected, span
from headwater.lens.errors import AnalysisError
from headwater.lens.examples.example import Example
from headwater.lens.model import HookedModel

How = Literal["mean", "texts"]


@analysis
def contribution_ablation(
    model: HookedModel,
    examples: Examples,
    classes: Annotated[
        str | Path | Sequence[str] | None, "a caption of each class, or a file with one a line"
    ] = None,
    labels: Annotated[
        str | Path | Sequence[int] | Sequence[str] | None,
        "what is right of each picture, a number in classes or its caption",
    ] = None,
    how: Annotated[How, "parts by their means, or heads by what captions rebuild"] = "mean",
    texts: Annotated[str | Path | Sequence[str] | None, "how=texts: the pool of captions, or a file"] = None,
    counts: Annotated[int | Sequence[int], "how=texts: captions a head"] = (1, 2, 4, 8),
    last: Annotated[int | None, "how=texts: layers whose heads are rebuilt; none: all", Bounds(1)] = None,
    draws: Draws = 1000,
    controls: Annotated[int, "how=texts: draws of random captions", Bounds(1)] = 5,
    seed: Seed = 0,
    batch_size: BatchSize = 16,
) -> xr.Dataset:
    """Share of pictures whose nearest class is right when parts of the embedding are replaced; `right` [step, picture].

    `how="mean"`: a part's contribution becomes its mean over the pictures. Steps pile up: "whole", then "mlps", then
    "class token" (what each head reads off it), then "attention ≤ 0", "attention ≤ 1" … from the first layer. The
    control goes the other way: "instead attention ≥ l", after "class token", from the last layer down.
    `how="texts"`: MLPs and layers before the `last` are means, and each head of the others is what its first m captions
    rebuild of it (text_span), for each m of `counts`; "random m" has as many random captions of the pool, and is the
    mean of `controls` draws. `accuracy`, `low` and `high` [step] are means and bounds that hold 95 % of the means of
    resampled pictures; `chance` is one over the number of classes. Without `labels` those of the examples are taken.
    Of a model with classes of its own (ViT) the outputs are its logits, and `classes` and `how="texts"` are left out.

    Only direct contributions are replaced: the streams that later layers read stay as they were.

    Question: Which parts does zero-shot accuracy rest on?
    Unit: share of pictures, 0 to 1.
    Source: Gandelsman, Efros & Steinhardt 2024, arXiv:2310.05916, and its released code.
    Cost: one forward pass; pictures × heads × d numbers in memory.
    Not for: what happens in a model without these parts (prune_heads, which runs it).

    >>> import headwater as hw, random
    >>> from headwater.data.pictures import canvases
    >>> rng = random.Random(0)
    >>> drawn = [canvases.canvas(rng, count=1, held_out=True) for _ in range(20)]
    >>> places = [f"a digit {place}" for place in canvases.PLACES]
    >>> right = [next(n for n, thing in enumerate(each.things) if thing) for each in drawn]
    >>> shots, model = [each.picture() for each in drawn], hw.load("clip-digits")
    >>> found = hw.analyses.contribution_ablation(model, shots, places, right)
    >>> found.step.values[:3].tolist(), float(found.accuracy[0])
    (['whole', 'mlps', 'class token'], 1.0)
    """
    pictures = Pictures.of(model, examples, batch_size)
    if len(pictures) < 2:
        raise AnalysisError("one picture is its own mean, so nothing would change; give several")
    names, towards = _classes(pictures.tower, classes)
    truth = _truth(examples, labels, names, len(pictures))
    parts = Parts.of(pictures, towards if how == "mean" else None)
    if how == "mean":
        steps = _means(parts)
    else:
        if towards is None:
            raise AnalysisError(f"{model.name} compares no captions with pictures; take how=mean")
        steps = _texts(parts, model, captions_of(texts, "texts"), counts, last, controls, seed)
        steps = {name: [each @ towards.T for each in outputs] for name, outputs in steps.items()}
    right = np.stack(
        [np.mean([(each.argmax(-1).numpy() == truth) for each in outputs], 0) for outputs in steps.values()]
    )
    found = intervals(right.T, ("step",), draws, seed, ("accuracy", "low", "high"))
    return xr.Dataset(
        {"right": (("step", "batch"), right), **found},
        coords={"step": list(steps), "batch": np.arange(len(pictures))},
        attrs={"chance": 1 / len(names), "pictures": len(pictures), "whole": float(right[0].mean())},
    )


class Parts:
    """All parts of the pictures' outputs on the CPU: heads [picture, layer, head, output], what each layer's heads read
    off the class token [picture, layer, output], and the terms beside heads [picture, term, output]."""

    def __init__(
        self, heads: Tensor, own: Tensor, others: Tensor, terms: list[str], widths: list[int]
    ) -> None:
        self.heads, self.own, self.others, self.terms, self.widths = heads, own, others, terms, widths

    @classmethod
    def of(cls, pictures: Pictures, towards: Tensor | None) -> Parts:
        rows: dict[int, tuple[Tensor, ...]] = {}
        terms: list[str] = []
        for places, run in pictures.runs():
            directions = run.directions(towards)
            heads, others = run.parts(towards, "head", "own")
            own = torch.stack([run.class_token(layer, directions) for layer in run.run.layers.values()], 1)
            terms = list(others)
            rest = torch.stack(list(others.values()), 1)
            rows |= dict(zip(places, zip(heads.cpu(), own.cpu(), rest.cpu(), strict=True), strict=True))
        stacked = [torch.stack([rows[n][k] for n in range(len(rows))]) for k in range(3)]
        widths = [pictures.tower.shape(layer).d_head for layer in pictures.tower.layers]
        return cls(stacked[0], stacked[1], stacked[2], terms, widths)

    def mean_mlps(self) -> Tensor:
        """The terms beside heads summed, MLPs as their means, [picture, output]."""
        mlps = torch.tensor([name.startswith("mlp.") for name in self.terms])
        return self.others[:, ~mlps].sum(1) + self.others[:, mlps].sum(1).mean(0)


def _means(parts: Parts) -> dict[str, list[Tensor]]:
    """The outputs [picture, output] of every step of `how="mean"`."""
    layers = parts.heads.sum(2)
    own = parts.own
    steps = {"whole": parts.others.sum(1) + layers.sum(1), "mlps": parts.mean_mlps() + layers.sum(1)}
    layers = layers - own + own.mean(0)
    steps["class token"] = parts.mean_mlps() + layers.sum(1)
    for first in range(1, layers.shape[1]):
        kept = layers.clone()
        kept[:, :first] = layers[:, :first].mean(0)
        steps[f"attention ≤ {first - 1}"] = parts.mean_mlps() + kept.sum(1)
    for end in range(layers.shape[1] - 1, 0, -1):
        kept = layers.clone()
        kept[:, end:] = layers[:, end:].mean(0)
        steps[f"instead attention ≥ {end}"] = parts.mean_mlps() + kept.sum(1)
    return {name: [outputs] for name, outputs in steps.items()}


def _texts(
    parts: Parts, model: HookedModel, pool: list[str], counts: int | Sequence[int], last: int | None, controls: int,
    seed: int,
) -> dict[str, list[Tensor]]:  # fmt: skip
    """The embeddings [picture, d] of every step of `how="texts"`."""
    embedded = embeddings_of(model, pool)
    n_layers, n_heads = parts.heads.shape[1:3]
    first = n_layers - min(last or n_layers, n_layers)
    base = parts.mean_mlps() + parts.heads[:, :first].sum((1, 2)).mean(0)
    rng = np.random.default_rng(seed)
    steps = {
        "whole": [parts.others.sum(1) + parts.heads.sum((1, 2))],
        "heads kept": [base + parts.heads[:, first:].sum((1, 2))],
        "heads as means": [base + parts.heads[:, first:].sum((1, 2)).mean(0)],
    }
    cells = list(np.ndindex(n_layers - first, n_heads))
    near = {
        (layer, head): projected(parts.heads[:, first + layer, head], embedded, parts.widths[first + layer])
        for layer, head in cells
    }
    for count in np.atleast_1d(counts).tolist():
        if count < 1:
            raise AnalysisError(f"counts={count}: a head is rebuilt from one caption or more")

        def rebuilt(random: bool, count: int = count) -> Tensor:
            found = base.clone()
            for layer, head in cells:
                order = rng.permutation(len(pool)).tolist() if random else None
                found += span(parts.heads[:, first + layer, head], near[layer, head], count, order).rebuilt
            return found

        steps[f"texts {count}"] = [rebuilt(False)]
        steps[f"random {count}"] = [rebuilt(True) for _ in range(controls)]
    return steps


def _classes(tower: HookedModel, classes: Any) -> tuple[list[str], Tensor | None]:
    """The names of the classes, and their captions' embeddings; None where the outputs are classes already."""
    if tower.classes:
        if classes is not None:
            raise AnalysisError(f"{tower.name} has classes of its own; leave classes out")
        return list(map(str, tower.classes)), None
    names = captions_of(classes, "classes")
    if len(names) < 2:
        raise AnalysisError("one class is always right; give a caption of each class")
    return names, embeddings_of(tower, names)


def _truth(examples: Examples, labels: Any, names: list[str], count: int) -> np.ndarray:
    """The number of the right class of each picture."""
    if labels is None:
        listed = examples if isinstance(examples, list | tuple) else [examples]
        labels = [each.label for each in listed if isinstance(each, Example)]
        if not labels or None in labels:
            raise AnalysisError(
                "labels is not given; give what is right of each picture, as its caption in classes"
            )
    elif isinstance(labels, str | Path):
        labels = captions_of(labels, "labels")
    found = []
    for label in labels:
        plain = label.item() if hasattr(label, "item") else label
        number = names.index(plain) if plain in names else plain
        if isinstance(number, str) and number.isdigit():
            number = int(number)
        if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < len(names):
            raise AnalysisError(
                f"the label {plain!r} is no class; give a number below {len(names)}, or its caption"
            )
        found.append(number)
    if len(found) != count:
        raise AnalysisError(f"{count} pictures have {len(found)} labels; give one each")
    return np.array(found)
