"""Retrieval heads and query-focused heads: which heads carry a sentence out of a long text, and what is lost without.

The copy-paste score of Wu et al. 2024 and the attention score of Zhang et al. 2025, both from needle tests.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from headwater.analyses._catalogue.analysis import analysis
from headwater.analyses._catalogue.settings import Bounds
from headwater.analyses._prompts.needles import Material, Needle, fitting, lengths_of, material_of, needles
from headwater.analyses.heads._needle_runs import NeedleRun
from headwater.lens.errors import AnalysisError
from headwater.lens.journal import Journal
from headwater.lens.model import HookedModel
from headwater.lens.progress import progress
from headwater.lens.records.provenance import provenance

PASSED = 0.5  # ROUGE-1 recall above which a test counts


@analysis
def retrieval_heads(
    model: HookedModel,
    lengths: Annotated[
        int | Sequence[int] | None, "tokens of the prompts; none: 128 and its doubles to 1,024"
    ] = None,
    depths: Annotated[int, "places of the needle, evenly from the beginning to the end", Bounds(1)] = 5,
    tests: Annotated[int, "needles for every length and depth", Bounds(1)] = 1,
    material: Annotated[Material | None, "sentences or random tokens; none: what the tokenizer can"] = None,
    masked: Annotated[int | Sequence[int], "numbers of heads that are masked, on other needles"] = (),
    controls: Annotated[int, "draws of random heads to mask", Bounds(1)] = 3,
    seed: Annotated[int, "seed of needles, texts and random heads", Bounds(0)] = 0,
    resume: Annotated[str | Path | None, "file of finished tests to resume from; none: no file"] = None,
) -> xr.Dataset:
    """Scores of all heads on needle tests, and how much of the needle is still told without the highest.

    `retrieval` [layer, head]: while the answer is written, a head gets 1/(tokens of the answer) whenever the key with
    its largest weight is a token of the answer in the text and is the token that the model writes. It is the mean over
    the tests in which the ROUGE-1 recall of what was written is above one half, NaN if there is none. As published a
    head counts as a retrieval head above 0.1. `query_focused` [layer, head]: the weight on the needle's keys, its mean
    over the question's tokens and over all tests. `recall` [length, depth] is the ROUGE-1 recall, 0 to 1, its mean over
    tests; depth 0 is the beginning of the text, 1 its end.

    With `masked`, on needles drawn with `seed + 1`: `masked_recall` and `masked_loss` [by, masked], where `by` is
    "none", "retrieval", "query_focused" (that many heads with the largest scores) or "random 1" … (as many heads drawn
    from those that neither list holds). The outputs of these heads are zero while the answer is written, not while the
    text is read, as in the released code. `masked_loss` is nats per token of the right answer, which tells more where
    the recall is 0 or 1. With `resume` each test is kept in that file, and the same call goes on after an interruption.

    Ours: the answer begins with the needle's first words ("The best thing to do in Oslo is to"), so that small models
    copy at all; as many tokens are written as the answer has (published: up to 50); words are not stemmed; the texts
    (analyses/_prompts/needles.py) are the reference of Python, or random tokens. One prompt is read once, and only
    rows of the question and the answer are looked at, so that no map is made. With a tokenizer that writes the
    sentences, `material` is "text"; "tokens" is for any vocabulary.

    Question: Which heads carry what a question asks for out of a long text?
    Unit: share of the answer's tokens that the head points at (retrieval), attention weight (query_focused), 0 to 1.
    Source: Wu et al. 2024, arXiv:2404.15574, held to the released code; Zhang et al. 2025, arXiv:2506.09944, held to
    its formula.
    Cost: one forward pass per test, and as many short ones as the answer has tokens.
    Not for: heads that read without copying (summaries, counting); comparing models by `recall`, which the answer's
    first words make easy; scores of few tests.

    >>> import headwater as hw
    >>> model = hw.load("tasks-4l")
    >>> found = hw.analyses.retrieval_heads(model, lengths=[60], depths=2, tests=2)
    >>> found.retrieval.shape, found.recall.dims, found.attrs["material"]
    ((4, 8), ('length', 'depth'), 'tokens')
    """
    if model.read_only:
        raise AnalysisError(f"the heads of {model.name} can not be masked while it writes: {model.read_only}")
    if not model.causal or model.is_encoder_decoder or not model.has_lm_head:
        raise AnalysisError(
            f"{model.name} writes no text behind a prompt; needle tests are for causal models"
        )
    material = material or material_of(model)
    lengths = lengths_of(fitting(model, material) if lengths is None else lengths)
    places, counts = np.linspace(0, 1, depths).tolist(), _listed(masked)
    _refuse(model, counts)
    settings = (lengths, places, tests, material)
    total = len(lengths) * depths * tests
    rows = {"retrieval": [], "query_focused": []}
    recalls: dict[tuple[int, float], list[float]] = {(n, d): [] for n in lengths for d in places}
    run = {
        "analysis": "retrieval_heads",
        **provenance(model),
        "settings": [*settings, counts, controls, seed],
    }
    with Journal.open(resume, run, lambda fault: AnalysisError(f"resume: {fault}")) as journal:
        for name, length, depth, test in progress(
            _named(needles(model, *settings, seed)), desc="needles", unit="test", total=total
        ):
            if journal.get(name) is None:
                journal.put(name, _measured(model, test))
            told = journal.get(name)
            recalls[length, depth].append(told["recall"])
            rows["query_focused"].append(torch.tensor(told["query_focused"], dtype=torch.float64))
            if told["recall"] > PASSED:
                rows["retrieval"].append(torch.tensor(told["retrieval"], dtype=torch.float64))
        nothing = torch.full((model.n_layers, model.n_heads), torch.nan, dtype=torch.float64)
        found = {name: torch.stack(each).mean(0) if each else nothing for name, each in rows.items()}
        recall = [[np.mean(recalls[n, d]) for d in places] for n in lengths]
        result = xr.Dataset(
            {name: (("layer", "head"), each.numpy()) for name, each in found.items()}
            | {"recall": (("length", "depth"), np.array(recall))},
            coords={
                "layer": model.layers, "head": np.arange(model.n_heads), "length": lengths, "depth": places,
            },
            attrs={"material": material, "passed": len(rows["retrieval"]), "of": total},
        )  # fmt: skip
        if counts:
            ways, gates = _ways(model, found, counts, controls, seed)
            pieces = []
            for name, _, _, test in progress(
                _named(needles(model, *settings, seed + 1)), desc="masked", unit="test", total=total
            ):
                if journal.get(f"masked {name}") is None:
                    journal.put(f"masked {name}", _without(model, test, gates))
                pieces.append(journal.get(f"masked {name}"))
            table = _table(torch.tensor(pieces, dtype=torch.float64).mean(0), ways, counts, found)
            result = result.merge(table, combine_attrs="override")
    return result


def _named(drawn: Iterator[tuple[int, float, Needle]]) -> Iterator[tuple[str, int, float, Needle]]:
    for number, (length, depth, test) in enumerate(drawn):
        yield f"test {number}", length, depth, test


def _measured(model: HookedModel, test: Needle) -> dict[str, Any]:
    """Recall and scores of one test, plain data."""
    run = NeedleRun.of(model, test)
    written = run.written(test.answer.stop - test.answer.start)[0]
    copied, mass = scores(run, written)
    return {"recall": test.recall(written), "retrieval": copied.tolist(), "query_focused": mass.tolist()}


def _without(model: HookedModel, test: Needle, gates: Tensor) -> list[list[float]]:
    """Recall and loss of one test under each of `gates`, plain data."""
    run = NeedleRun.of(model, test)
    written = run.written(test.answer.stop - test.answer.start, gates)
    return [[test.recall(each) for each in written], run.answer_loss(gates).tolist()]


def scores(run: NeedleRun, written: Tensor) -> tuple[Tensor, Tensor]:
    """The copy-paste score and the weight on the needle of one test, both [layer, head] in float64."""
    test = run.test
    rows = run.rows(written)
    ids, top = test.ids[0], rows.top[..., -len(written) :]
    inside = (top >= test.answer.start) & (top < test.answer.stop)
    copied = inside & (ids[top.clamp(max=len(ids) - 1)] == written)
    asked = test.question.stop - test.question.start
    return copied.double().sum(-1) / (test.answer.stop - test.answer.start), rows.mass[..., :asked].mean(-1)


def _listed(given: int | Sequence[int]) -> list[int]:
    return [int(each) for each in np.atleast_1d(np.asarray(given, dtype=int))]


def _refuse(model: HookedModel, counts: list[int]) -> None:
    most = model.n_layers * model.n_heads // 3
    if wrong := [each for each in counts if not 1 <= each <= most]:
        raise AnalysisError(f"masked={wrong}: give 1 to {most} heads, so that others are left to be drawn")


def _ways(
    model: HookedModel, found: dict[str, Tensor], counts: list[int], controls: int, seed: int
) -> tuple[list[str], Tensor]:  # fmt: skip
    """Names of the ways to choose heads, and gates [copy, layer, head]: none masked, then `counts` for each way."""
    ways = {name: torch.argsort(-each.flatten(), stable=True) for name, each in found.items()}
    taken = torch.cat([order[: max(counts)] for order in ways.values()])
    heads = torch.arange(model.n_layers * model.n_heads)
    left = heads[~torch.isin(heads, taken)]
    generator = torch.Generator().manual_seed(seed)
    for n in range(controls):
        ways[f"random {n + 1}"] = left[torch.randperm(len(left), generator=generator)]
    gates = torch.ones(1 + len(ways) * len(counts), len(heads))
    for place, (order, count) in enumerate(((o, c) for o in ways.values() for c in counts), 1):
        gates[place, order[:count]] = 0
    return list(ways), gates.unflatten(1, (model.n_layers, model.n_heads))


def _table(means: Tensor, ways: list[str], counts: list[int], found: dict[str, Tensor]) -> xr.Dataset:
    """`masked_recall` and `masked_loss` [by, masked] from means [2, copy]."""
    tables = means[:, 1:].unflatten(1, (len(ways), len(counts)))
    if found["retrieval"].isnan().any():
        tables[:, 0] = torch.nan
    tables = torch.cat([means[:, :1, None].expand(2, 1, len(counts)), tables], 1).numpy()
    return xr.Dataset(
        {
            name: (("by", "masked"), each)
            for name, each in zip(("masked_recall", "masked_loss"), tables, strict=True)
        },
        coords={"by": ["none", *ways], "masked": counts},
    )
