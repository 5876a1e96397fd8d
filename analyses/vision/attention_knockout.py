"""Attention knockout between a picture, the question and the answer, in windows of layers (Kaduri et al., CVPR 2025).

A route is blocked in some layers: its target can not attend to its source there. What is left of the right answer says
whether something that the answer needs goes this way in these layers, or could.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np
import xarray as xr

from headwater.analyses._catalogue.analysis import analysis
from headwater.analyses._catalogue.settings import BatchSize, Bounds, Draws, Seed
from headwater.analyses._measures.bootstrap import interval
from headwater.analyses._prompts.answers import Answered, Answers, answered, read
from headwater.analyses._prompts.examples import Examples
from headwater.lens.edits.scores import Knockout
from headwater.lens.errors import AnalysisError
from headwater.lens.model import HookedModel
from headwater.lens.progress import progress

ROUTES = "image->question, image->answer, question->answer"
GROUPS = ("image", "before", "question", "answer")


@analysis
def attention_knockout(
    model: HookedModel,
    examples: Examples,
    answers: Answers = None,
    routes: Annotated[
        str, "source->target, several with commas between; image, before, question, answer"
    ] = ROUTES,
    window: Annotated[int | None, "layers of a window; none: a quarter of them", Bounds(1)] = None,
    step: Annotated[int, "layers from one window to the next", Bounds(1)] = 1,
    blocked: Annotated[Literal["window", "others"], "layers that are blocked"] = "window",
    controls: Annotated[int, "draws of random keys in the place of a route's source", Bounds(0)] = 1,
    length: Annotated[int, "tokens of the model's own answer at most, where none is given", Bounds(1)] = 1,
    batch_size: BatchSize = 16,
    draws: Draws = 2000,
    seed: Seed = 0,
) -> xr.Dataset:
    """What is left of the answer when `target` can not attend to `source` (scores -inf) in a window of layers.

    Groups: "image", the picture's tokens; "before", the words before it; "question", those behind it but the prompt's
    last; "answer", the tokens that write the answer: the prompt's last one, and the answer's own but its last. Windows
    are `window` layers beside each other, and "all"; with `blocked="others"` every other layer is blocked. Dataset
    [route, window], means over examples with 95 % bounds (`…_low`, `…_high`): `probability` of the whole answer;
    `accuracy`, the share of answers of which each token is the likeliest; and of both the `random_…`, with as many keys
    blocked for the same target, drawn from all tokens before the answer. `plain_probability` and `plain_accuracy` are
    those without a knockout, `gap` is random_probability minus probability. `answers` are texts or ids, one for all or
    one for each; without them the model's own, so that accuracy is the share of answers that stay.

    Question: Which way, and in which layers, does what is seen go to the answer?
    Unit: probability and share of examples, 0 to 1.
    Source: Kaduri, Bagon & Dekel, CVPR 2025, formula from its abstract and a summary (there a judge compares whole
    descriptions); windows as in Geva et al., EMNLP 2023; random keys are ours.
    Cost: routes × windows × (1 + controls) forward passes of the examples.
    Not for: saying that a way is used: later layers may mend what a knockout breaks, which no model was trained for.

    >>> import headwater as hw
    >>> from headwater.lens.loading import zoo
    >>> model = hw.load(zoo.build("llava"))  # random weights
    >>> given = zoo.inputs("llava", lengths=(11, 11))
    >>> prompts = model.to_tokens(given["input_ids"], pixel_values=given["pixel_values"])
    >>> found = hw.analyses.attention_knockout(model, prompts, routes="image->answer", window=1)
    >>> found.probability.shape, found.window.values.tolist()
    ((1, 3), ['0', '1', 'all'])
    """
    ways = _routes(routes)
    size = max(model.n_layers // 4, 1) if window is None else window
    if size > model.n_layers:
        raise AnalysisError(
            f"window={size}, but {model.name} has {model.n_layers} layers; give a smaller one"
        )
    spans = _windows(model.layers, size, step)
    batches = answered(model, examples, answers, length, batch_size)
    count = sum(len(batch.places) for batch in batches)
    plain = np.full((2, count), np.nan)
    left = np.full((2, 1 + controls, count, len(ways), len(spans)), np.nan)
    with progress(total=len(batches) * len(ways) * len(spans), desc="attention knockout", unit="run") as bar:
        for batch in batches:
            plain[:, batch.places] = np.stack([each.numpy() for each in read(model, batch)])
            for r, (source, target) in enumerate(ways):
                blocked_keys = _keys(batch, source, target)
                same = [blocked_keys] * len(batch.places)
                keys = [same] + [_random(batch, len(blocked_keys), (seed, r, n)) for n in range(controls)]
                for w, (_, layers) in enumerate(spans):
                    where = layers if blocked == "window" else [n for n in model.layers if n not in layers]
                    for n, some in enumerate(keys):
                        asking = batch.groups[target]
                        edits = [
                            Knockout(asking, own, layers=where, rows=[row]) for row, own in enumerate(some)
                        ]
                        with model.edit(*edits if where else ()):
                            left[:, n, batch.places, r, w] = np.stack(
                                [each.numpy() for each in read(model, batch)]
                            )
                    bar.update()
    found: dict[str, Any] = {}
    dims = ("route", "window")
    for k, name in enumerate(("probability", "accuracy")):
        found |= _with_bounds(name, left[k, 0], dims, draws, seed)
        found |= _with_bounds(f"plain_{name}", plain[k], (), draws, seed)
        if controls:
            found |= _with_bounds(f"random_{name}", left[k, 1:].mean(0), dims, draws, seed)
    if controls:
        found |= _with_bounds("gap", left[0, 1:].mean(0) - left[0, 0], dims, draws, seed)
    return xr.Dataset(
        found,
        coords={
            "route": [f"{source}->{target}" for source, target in ways],
            "window": [name for name, _ in spans],
            "first_layer": ("window", [layers[0] for _, layers in spans]),
            "last_layer": ("window", [layers[-1] for _, layers in spans]),
        },
        attrs={
            "examples": count,
            "window": size,
            "answers": "the model's own" if answers is None else "given",
        },
    )


def _routes(given: str) -> list[tuple[str, str]]:
    found = []
    for each in str(given).split(","):
        source, arrow, target = (part.strip() for part in each.partition("->"))
        if not arrow or source not in GROUPS or target not in GROUPS:
            raise AnalysisError(
                f"{each.strip()!r} is no route; write source->target with {', '.join(GROUPS)}, as in image->question"
            )
        found.append((source, target))
    return found


def _windows(layers: Sequence[int], size: int, step: int) -> list[tuple[str, list[int]]]:
    """Name and layers of each window, and of all layers together."""
    spans = [list(layers[start : start + size]) for start in range(0, len(layers) - size + 1, step)]
    return [
        *(
            (str(span[0]) if size == 1 else f"{span[0]}-{span[-1]}", span)
            for span in spans
            if size < len(layers)
        ),
        ("all", list(layers)),
    ]


def _keys(batch: Answered, source: str, target: str) -> list[int]:
    found, looking = batch.groups[source], batch.groups[target]
    if not found or not looking:
        empty = source if not found else target
        raise AnalysisError(f"example {batch.places[0]} has no token that is {empty!r}; leave its routes out")
    return found


def _random(batch: Answered, count: int, drawn: tuple[int, ...]) -> list[list[int]]:
    """As many tokens for each example, drawn from all before those that write the answer, whatever its batch."""
    pool = batch.prompt - 1
    return [
        np.random.default_rng((*drawn, place)).permutation(pool)[: min(count, pool)].tolist()
        for place in batch.places
    ]


def _with_bounds(
    name: str, values: np.ndarray, dims: tuple[str, ...], draws: int, seed: int
) -> dict[str, Any]:
    parts = interval(values, draws, seed)
    return {f"{name}{end}": (dims, part) for end, part in zip(("", "_low", "_high"), parts, strict=True)}
