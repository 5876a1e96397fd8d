"""Circuit repair: force heads to attend to the tokens of the wrong answers, and see whether the model errs less.

Merullo, Eickhoff & Pavlick (ICLR 2024, arXiv 2310.08744): in GPT-2 Medium the inhibition heads, which keep mover heads
off the wrong name, do not fire on coloured objects; forced onto the wrong colours they raise the accuracy from 49.6 to
93.7 %. The analysis adds two controls: the same number of other heads, and the same heads on random tokens. MLPs that
tell the answers apart are not covered.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from headwater.analyses._catalogue.analysis import analysis
from headwater.analyses._catalogue.settings import Bounds, checked
from headwater.analyses._measures.bootstrap import finite_mean, interval
from headwater.analyses._measures.measure import (
    Answer,
    AnswerSetting,
    Explained,
    PositionSetting,
    WrongSetting,
)
from headwater.analyses._prompts.examples import Batch, Examples, joined, keys_of, queries_of
from headwater.analyses._prompts.pairs import PairExamples, pairs_of, side_by_side
from headwater.analyses._prompts.positions import place_of
from headwater.analyses.circuits.path_patch import path_patch
from headwater.lens.edits import InjectPattern
from headwater.lens.errors import AnalysisError
from headwater.lens.model import HookedModel
from headwater.lens.models.axes import TEXTS
from headwater.lens.models.token_ids import token_id
from headwater.lens.naming.heads import Head, HeadNames, every_head, named
from headwater.lens.progress import progress

TREATMENTS = ("none", "forced", "onto_answer", "random_heads", "random_keys")


@analysis
def repair(
    model: HookedModel,
    pairs: Examples | PairExamples,
    corrupt: Examples | None = None,
    heads: Annotated[HeadNames, "heads that are forced, as 5.1 5.4; none: found"] = "",
    position: PositionSetting = -1,
    movers: Annotated[HeadNames, "heads whose attention is watched, as 6.0 6.2"] = "",
    answer: AnswerSetting = None,
    wrong: WrongSetting = None,
    count: Annotated[int, "how many heads are found where none is named", Bounds(1)] = 2,
    controls: Annotated[int, "draws of each control", Bounds(1)] = 4,
    draws: Annotated[int, "resamples of the prompts for the intervals", Bounds(1)] = 1000,
    seed: Annotated[int, "seed of the controls and of the resampling", Bounds(0)] = 0,
    batch_size: Annotated[int, "prompts of equal length that run together", Bounds(1)] = 32,
) -> xr.Dataset:
    """`accuracy` [treatment, bound]: how often the likeliest next token is the answer, with 95 % intervals.

    Heads and the tokens that they look at are of the model's part: with `model.part("cross")` those of the encoder.

    In every clean prompt the attention of `heads` at query `position` is set to equal weights on the tokens that equal
    a wrong answer ("forced"), on those that equal the answer ("onto_answer"), or on as many random tokens that equal
    neither ("random_keys"). "random_heads" forces as many random other heads, no movers, onto the wrong ones (all there
    are where they are fewer; NaN where there is none). Controls are means over `controls` draws; "none" is the
    unchanged model. The answer is read at the last position.

    `answer` and `wrong` default to those of the examples (all wrong ones), else to the model's predictions on the two
    prompts. A prompt without a token to force onto stays unchanged; `untouched` counts prompts without a wrong one.
    Without `heads`, `inhibition_like` finds `count` of them and the movers from the corrupt prompts.

    `right` [treatment, batch] is 0, 1 or the share of draws; `difference` is the answer's logit minus the highest wrong
    one's. `repaired` and `new_mistakes` [treatment] are shares of all prompts: wrong before and right under the
    treatment, and the reverse. `change` [of, treatment, bound] are paired differences from "none" of accuracy and
    difference. `attention` [treatment, mover, on, batch] is the movers' weight from the last position on wrong and
    right tokens, `attention_change` [treatment, mover, on, bound] its difference from "none".

    Question: Does the model err less when these heads are made to look at the wrong answers?
    Unit: share of prompts answered right; difference: logits; attention: weight.
    Source: Merullo, Eickhoff & Pavlick 2024, arXiv:2310.08744 (its text); equal weights, controls and movers are ours.
    Cost: 3 + 2·`controls` passes per prompt, as many recordings of movers; path_patch twice where no head is named.
    Not for: choosing heads on the prompts they are then judged on; what heads do by themselves: weights are forced.

    >>> import headwater as hw
    >>> model = hw.load("tasks-4l")
    >>> clean = "When Mary and John went to the store , John gave a drink to"
    >>> corrupt = "When Mary and John went to the store , Mary gave a drink to"
    >>> found = hw.analyses.repair(model, [(clean, corrupt)], heads="2.0", movers="3.0", controls=1, draws=2)
    >>> found.right.sel(treatment="none").values.tolist()
    [1.0]
    """
    _refuse_without_words(model)
    pairs = side_by_side(model, pairs, corrupt)
    forced, watched = (named(each, model.layers, model.n_heads) for each in (heads, movers))
    if not forced:
        forced, found_movers = inhibition_like(model, pairs, count=count)
        watched = watched or found_movers
    others = [h for h in every_head(model.layers, model.n_heads) if h not in {*forced, *watched}]
    batches = _cases(model, pairs, position, answer, wrong, batch_size)
    cases = sorted((case for batch in batches for case in batch), key=lambda case: case.place)
    runs = _runs(cases, forced, others, controls, seed)
    shape = (len(TREATMENTS), controls, len(cases))
    right, difference = np.full(shape, np.nan), np.full(shape, np.nan)
    seen = np.full((*shape[:2], len(watched), 2, len(cases)), np.nan)
    with progress(total=len(runs) * len(batches), desc="repair", unit="run") as bar:
        for (treatment, draw), (acting, keys) in runs.items():
            slot = TREATMENTS.index(treatment), draw
            for batch in batches:
                places = [case.place for case in batch]
                found = _run(model, batch, acting, [keys[place] for place in places], position, watched)
                right[slot][places], difference[slot][places] = found[:2]
                seen[slot][:, :, places] = found[2]
                bar.update()
    result = _dataset(finite_mean(right, 1), finite_mean(difference, 1), finite_mean(seen, 1), draws, seed)
    names = [str(head) for head in watched]
    untouched = sum(not case.wrongs for case in cases)
    result = result.assign_coords(mover=names)
    return result.assign_attrs(
        heads=[str(h) for h in forced], movers=names, pairs=len(cases), untouched=untouched
    )


@checked
def inhibition_like(
    model: HookedModel,
    pairs: Examples | PairExamples,
    corrupt: Examples | None = None,
    count: Annotated[int, Bounds(1)] = 2,
    movers: Annotated[int, Bounds(1)] = 3,
) -> tuple[list[Head], list[Head]]:
    """Heads that change the answer by way of the movers' queries, and the movers, found by two runs of `path_patch`.

    Movers are the heads after the first layer whose output changes the logits most (mean over pairs, MLPs recomputed).
    The inhibition-like heads are the `count` earlier heads whose output changes the logits most, in either direction,
    through the movers' queries alone. Their effect may still be small.

    >>> import headwater as hw
    >>> model = hw.load("tasks-4l")
    >>> clean = "When Mary and John went to the store , John gave a drink to"
    >>> corrupt = "When Mary and John went to the store , Mary gave a drink to"
    >>> hw.analyses.inhibition_like(model, [(clean, corrupt)], count=1, movers=1)[1]
    [Head(layer=3, head=0)]
    """
    pairs = side_by_side(model, pairs, corrupt)
    found = path_patch(model, pairs)
    late = _ranked(found, model.layers[1:])[:movers]
    if not late:
        raise AnalysisError(f"{model.name} has no head before another; name heads")
    early = [layer for layer in model.layers if layer < min(head.layer for head in late)]
    if not early:
        late = [head for head in late if head.layer > model.layers[0]]
        early = model.layers[:1]
    sent = path_patch(model, pairs, receivers=[f"{head}.q" for head in late])
    return _ranked(sent, early)[:count], late


def _ranked(found: xr.DataArray, layers: Sequence[int]) -> list[Head]:
    """Heads of some layers, the largest mean effect first."""
    effect = np.abs(np.nan_to_num(finite_mean(found.values, 0)))
    names = [str(name) for name in found["sender"].values]
    order = [names[n] for n in np.argsort(-effect, kind="stable") if names[n][0].isdigit()]
    return [head for head in map(Head.parse, order) if head.layer in layers]


def _refuse_without_words(model: HookedModel) -> None:
    """AnalysisError where the heads look at no tokens of a text, among which answers could stand."""
    part = model.parts[model.part_name]
    if not model.has_lm_head:
        raise AnalysisError(
            f"{model.name} has no language head, so it says no answer that heads could be kept off"
        )
    if part.keys not in TEXTS:
        raise AnalysisError(
            f"the heads of {part.name} in {model.name} look at {part.keys}, in which no answer's token stands; take a "
            "part that looks at a text"
        )


class _Case:
    """A prompt: its row [1, position] with further inputs, the ids of its answers, and the keys that hold one of them:
    in a causal part those up to the query."""

    def __init__(
        self, model: HookedModel, place: int, row: Tensor, answer: int, wrong: list[int], position: int
    ) -> None:
        self.place, self.row, self.answer, self.wrong = place, row, answer, wrong
        at = place_of(position, queries_of(model, row).shape[1], f"pair {place}")
        seen = keys_of(model, row).ids[0].cpu()
        seen = seen[: at + 1] if model.causal else seen
        self.keys = len(seen)
        self.answers = (seen == answer).nonzero()[:, 0].tolist()
        self.wrongs = torch.isin(seen, torch.tensor(wrong)).nonzero()[:, 0].tolist()

    def random(self, rng: np.random.Generator) -> list[int]:
        """As many other keys as hold wrong answers; all where there are fewer."""
        taken = {*self.answers, *self.wrongs}
        free = [n for n in range(self.keys) if n not in taken]
        return sorted(rng.permutation(free)[: len(self.wrongs)].tolist())


Run = tuple[list[Head], list[list[int]]]  # the heads that are forced, and the keys in each prompt


def _runs(
    cases: list[_Case], forced: list[Head], others: list[Head], controls: int, seed: int
) -> dict[tuple[str, int], Run]:
    wrongs = [case.wrongs for case in cases]
    runs: dict[tuple[str, int], Run] = {
        ("none", 0): ([], wrongs),
        ("forced", 0): (forced, wrongs),
        ("onto_answer", 0): (forced, [case.answers for case in cases]),
    }
    for draw in range(controls):
        rng = np.random.default_rng([seed, draw])
        picked = [others[n] for n in rng.permutation(len(others))[: len(forced)]]
        if picked:
            runs["random_heads", draw] = (picked, wrongs)
        runs["random_keys", draw] = (forced, [case.random(rng) for case in cases])
    return runs


def _cases(
    model: HookedModel, given: PairExamples, position: int, answer: Answer | None, wrong: Answer | None, size: int
) -> list[list[_Case]]:  # fmt: skip
    """The prompts with their answers, in batches of one length."""
    explained = Explained(model, None, answer, wrong, -1, "logit")
    found = []
    for pairs in pairs_of(model, given, size):
        batch = Batch(pairs.clean, pairs.places)
        right, other = explained.ids_of("answer", batch), explained.ids_of("wrong", batch)
        with torch.no_grad():
            clean, corrupt = (model(ids)[:, -1].float().cpu() for ids in (pairs.clean, pairs.corrupt))
        if right is None and pairs.answers is not None:
            right = [token_id(model, word, "answer") for word in pairs.answers]
        right = clean.argmax(-1).tolist() if right is None else right
        if other is not None:
            wrongs = [[token] for token in other]
        elif pairs.wrongs is not None:
            wrongs = [[token_id(model, word, "wrong") for word in given[n].wrong] for n in pairs.places]
        else:
            rather = corrupt.scatter(1, torch.tensor(right)[:, None], float("-inf")).argmax(-1)
            wrongs = [[token] for token in rather.tolist()]
        each = zip(pairs.places, right, wrongs, strict=True)
        found.append(
            [
                _Case(model, place, batch.rows([n]), one, other, position)
                for n, (place, one, other) in enumerate(each)
            ]
        )
    return found


def _run(
    model: HookedModel, batch: list[_Case], heads: list[Head], keys: list[list[int]], position: int,
    watched: list[Head],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
    """Right [prompt], difference [prompt] and the watched heads' weights [mover, wrong and right, prompt]."""
    ids = joined([case.row for case in batch])
    by_keys: dict[tuple[int, ...], list[int]] = {}  # rows that share their forced keys share an edit
    for row, mine in enumerate(keys):
        if heads and mine:
            by_keys.setdefault(tuple(mine), []).append(row)
    edits = [
        InjectPattern({"keys": list(mine)}, 1.0, heads=heads, queries=position, rows=rows)
        for mine, rows in by_keys.items()
    ]
    seen = np.zeros((len(watched), 2, len(batch)))
    last = queries_of(model, ids).shape[1] - 1
    with torch.no_grad(), model.edit(*edits):
        logits = model(ids)[:, -1].double().cpu()
        record = (
            model.record(ids, statistics=(), layers=sorted({h.layer for h in watched})) if watched else None
        )
    for place, head in enumerate(watched):
        assert record is not None
        row = record.map(head.layer).tile(slice(last, last + 1), slice(None))
        for n, case in enumerate(batch):
            weights = row[n, head.head, 0].double().cpu()
            seen[place, :, n] = float(weights[case.wrongs].sum()), float(weights[case.answers].sum())
    answers = torch.tensor([case.answer for case in batch])
    best = logits.gather(1, answers[:, None])[:, 0]
    worst = torch.stack([logits[n, case.wrong].max() for n, case in enumerate(batch)])
    return (logits.argmax(-1) == answers).double().numpy(), (best - worst).numpy(), seen


def _dataset(
    right: np.ndarray, difference: np.ndarray, seen: np.ndarray, draws: int, seed: int
) -> xr.Dataset:
    def bounds(values: np.ndarray) -> np.ndarray:
        """[..., bound] of values [..., prompt], of which there may be none."""
        if not values.size:
            return np.empty((*values.shape[:-1], 3))
        return np.stack(interval(np.moveaxis(values, -1, 0), draws, seed), -1)

    before = right[:1]
    return xr.Dataset(
        {
            "accuracy": (("treatment", "bound"), bounds(right)),
            "right": (("treatment", "batch"), right),
            "difference": (("treatment", "batch"), difference),
            "repaired": ("treatment", ((1 - before) * right).mean(-1)),
            "new_mistakes": ("treatment", (before * (1 - right)).mean(-1)),
            "change": (
                ("of", "treatment", "bound"),
                np.stack([bounds(part - part[:1]) for part in (right, difference)]),
            ),
            "attention": (("treatment", "mover", "on", "batch"), seen),
            "attention_change": (("treatment", "mover", "on", "bound"), bounds(seen - seen[:1])),
        },
        coords={
            "treatment": list(TREATMENTS), "bound": ["mean", "low", "high"], "of": ["accuracy", "difference"],
            "on": ["wrong", "right"], "batch": np.arange(right.shape[-1]),
        },
    )  # fmt: skip
