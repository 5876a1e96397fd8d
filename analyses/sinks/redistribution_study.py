"""Redistribution study: the change of a measure when attention moves away from sinks, by strength and by head set.

A plain run finds the sinks of each text. Each text then runs under `Redistribute` and under three controls. The result
has the values of every text and paired intervals over texts. With `resume` an interrupted study goes on. Edits during
generation are not covered.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from headwater.analyses._catalogue.analysis import analysis
from headwater.analyses._catalogue.settings import Bounds, Draws
from headwater.analyses._measures.bootstrap import interval, intervals
from headwater.analyses._measures.measure import (
    AnswerSetting,
    CountedKindSetting,
    Explained,
    Measure,
    PositionSetting,
    WrongSetting,
)
from headwater.analyses._prompts.examples import Batch, Examples, as_tokens, loss_of, outputs_of
from headwater.analyses._prompts.texts import Texts
from headwater.analyses.sinks._redistributed_runs import TREATMENTS, Find, Redistributions, Value
from headwater.analyses.sinks._sink_keys import KeysSetting, RuleSetting, ThresholdSetting, sink_keys
from headwater.lens.edits.base import plain
from headwater.lens.errors import AnalysisError
from headwater.lens.files import digest_of
from headwater.lens.journal import Journal
from headwater.lens.model import HookedModel
from headwater.lens.naming.heads import Head, HeadNames, chosen, every_head, named
from headwater.lens.recipes.image_tokens import image_tokens
from headwater.lens.records.provenance import provenance
from headwater.lens.records.record import Record

FILTERED = "filtered"
CALM = 0.4  # ACT's beta


@analysis
def redistribution_study(
    model: HookedModel,
    examples: Examples,
    measure: Measure | None = None,
    rule: RuleSetting = "share",
    keep: Annotated[str | Sequence[float], "shares of the weight to keep, 0 to 1"] = "0 0.25 0.5 0.75",
    heads: Annotated[HeadNames | Mapping[str, Any], 'head sets, as "all; 1.0 1.2"'] = "all",
    keys: KeysSetting = 0,
    threshold: ThresholdSetting = None,
    among: Annotated[
        str | Sequence[int], "tokens that are moved from, sinks and controls alike: all, image, or numbers"
    ] = "all",
    held_out: Annotated[Examples | None, "texts for the head filter of ACT; none: no filter"] = None,
    controls: Annotated[int, "draws of each control, whose results are averaged", Bounds(1)] = 2,
    answer: AnswerSetting = None,
    wrong: WrongSetting = None,
    position: PositionSetting = -1,
    kind: CountedKindSetting = "log_probability",
    draws: Draws = 1000,
    seed: Annotated[int, "seed of the controls and of the draws", Bounds(0)] = 0,
    batch_size: Annotated[int, "texts of equal length, or edited rows, that run together", Bounds(1)] = 16,
    resume: Annotated[str | Path | None, "file of finished passes to resume from; none: no file"] = None,
) -> xr.Dataset:
    """`effect` [heads, keep, treatment, batch] = measure under the treatment - plain measure; higher is better.

    `rule` (or `keys` if it is None) finds the sinks of each text, layer and head in the plain run; "act" leaves out
    each head's first sink. With `among` only these tokens count as sinks, and random keys are drawn from these: with
    rule="massive", among="image", keep=0 and kind="correct" the study asks whether visual sinks can be masked and as
    many random image tokens can not (Kang et al., ICLR 2025). The weights on sinks are multiplied by `keep`, and the
    freed weight goes to the row's other keys in proportion (`Redistribute`). A row that sees no other key does not
    change. `treatment` is "sinks", in the heads of the set; "random_heads", the same in as many heads outside of the
    set (NaN if there are none); "random_keys", as many random keys that are not sinks, in the heads of the set;
    "same_mass", a random half of the keys that are no sink in the layer, with `keep` set per text and layer so that the
    same weight moves in the plain run (or all of it). Controls are means of `controls` draws. `freed` [heads, keep,
    treatment, batch] is the weight that moves, mean over queries and heads of the set. `plain` [batch] is the plain
    measure, `sinks` [batch] the mean number of sinks of a head. `mean`, `low`, `high` [heads, keep, treatment] over
    texts have 95 % bootstrap bounds; `beyond` [heads, keep, control, bound] are mean and bounds of the paired
    difference of the effects, sinks minus each control.

    The measure is minus `model.loss` (nats; of two towers their similarity, less 1), or `kind` of `answer` (less
    `wrong`) at `position`, or `measure(outputs) → [batch]`, whose rows come in no fixed order. `heads` may be a mapping
    of names to head sets. `held_out` adds the head set "filtered": the heads whose redistribution alone, with keep 0.4,
    does not lower the mean measure on those texts (ACT's filter, there with accuracy); the attribute `filtered` lists
    them. A held-out text has the `answer` of the examples, which must be one for all. With `model.part("vision")` heads
    and keys are those of the part, and the measure stays that of the whole model.

    With `resume` each forward pass is saved to that file before the next one starts. The same call then continues an
    interrupted study and gives the same numbers; a finished file gives the result at once. AnalysisError if the file
    was changed or belongs to other texts, models, settings, versions or plain values of the measure. It is JSON text.

    Question: Does taking attention off sinks change what the model does, more than taking it off anything else?
    Unit: that of the measure: nats per token by default; freed: weight per query.
    Source: ours, with the edit and the head filter of ACT (Yu et al., ICML 2024, arXiv:2406.15765), held to its code.
    Cost: one recording per batch, then head sets × strengths × (1 + 3·controls) forward passes per text.
    Not for: choosing heads on the texts they are then judged on (give held_out); effects in generated text.

    >>> import headwater as hw
    >>> model = hw.load("tasks-4l")
    >>> text = "When Mary and John went to the store , John gave a drink to"
    >>> found = hw.analyses.redistribution_study(model, text, rule=None, keep="0", controls=1, draws=10)
    >>> found.treatment.values.tolist()
    ['sinks', 'random_heads', 'random_keys', 'same_mass']
    >>> bool(found.effect.sel(treatment="sinks").item() < found.effect.sel(treatment="random_keys").item())
    True
    """
    keeps = _keeps(keep)
    sets = _sets(model, heads)
    if model.read_only:
        raise AnalysisError(f"the attention of {model.name} can not be edited: {model.read_only}")
    explained = None
    if measure is not None or answer is not None:
        explained = Explained(model, measure, answer, wrong, position, kind, of_classes=True)

    def find(ids: Tensor) -> tuple[Record, Tensor, Tensor]:
        levels = ("qk", "residual") if rule == "massive" else ("qk",)
        record = model.record(ids, statistics=("received", "visible"), keep=levels)
        taken = torch.ones_like(record.key_axis.valid)
        if not (isinstance(among, str) and among == "all"):
            taken = image_tokens(model, as_tokens(ids), among)
        found = sink_keys(record, keys, rule, threshold, drop_first=True)
        return record, found & taken[:, None, None], taken

    def value_of(batch: Batch) -> Value:
        if explained is None:
            loss, places = loss_of(model, None), batch.places
            return lambda rows, texts: -loss(Batch(rows, [places[n] for n in texts.tolist()])).double()
        outputs, measured = outputs_of(model), explained.of(batch)
        return lambda rows, texts: measured(outputs(rows), texts)

    texts = Texts.of(model, examples, batch_size)
    later = None if held_out is None else Texts.of(model, held_out, batch_size)
    if later is not None and answer is not None and not isinstance(answer, str | int):
        raise AnalysisError(
            "held_out texts have no answers of their own; give one answer for all, or a measure"
        )
    asked = explained.settings if explained is not None else {"measure": "minus the loss"}
    own = {"keys": keys if rule is None else None, **asked}
    filtered: list[str] | None = None
    run = {
        "analysis": "redistribution_study", **provenance(model), "device": model.device.type, "keep": keeps,
        "batch_size": batch_size, "heads": {name: _names(model, mask) for name, mask in sets.items()},
        "texts": _digest(texts), "held_out": None if later is None else _digest(later), "rule": rule,
        "threshold": threshold, "among": plain(among), "controls": controls, "seed": seed, **own,
    }  # fmt: skip
    with Journal.open(resume, run, lambda fault: AnalysisError(f"resume: {fault}")) as journal:
        if later is not None:
            filtered = _filter(model, later, find, value_of, batch_size, journal)
            sets[FILTERED] = _mask(model, filtered)
        study = Redistributions(model, list(sets.values()), keeps, TREATMENTS, controls, seed)
        values, freed, unedited, sinks = study.run(
            texts.batches, find, value_of, batch_size, journal, "study"
        )
    result = _dataset(values - unedited, freed, draws, seed)
    result = result.assign(plain=("batch", unedited), sinks=("batch", sinks))
    result = result.assign_coords(heads=list(sets), keep=keeps, treatment=list(TREATMENTS))
    return result.assign_attrs({**own, "examples": len(unedited), "filtered": filtered})


def _dataset(effect: np.ndarray, freed: np.ndarray, draws: int, seed: int) -> xr.Dataset:
    dims = ("heads", "keep", "treatment", "batch")
    result = xr.Dataset({"effect": (dims, effect), "freed": (dims, freed)})
    by_text = np.moveaxis(effect, -1, 0)
    result = result.assign(intervals(by_text, dims[:-1], draws, seed))
    beyond = np.stack(interval(by_text[..., :1] - by_text[..., 1:], draws, seed), -1)
    result["beyond"] = (("heads", "keep", "control", "bound"), beyond)
    return result.assign_coords(control=list(TREATMENTS[1:]), bound=["mean", "low", "high"])


def _filter(
    model: HookedModel, texts: Texts, find: Find, value_of: Any, rows: int, journal: Journal
) -> list[str]:
    """The heads whose redistribution alone does not lower the mean measure."""
    every = every_head(model.layers, model.n_heads)
    alone = Redistributions(model, [_mask(model, [str(h)]) for h in every], [CALM], ("sinks",), 1, 0)
    values, _, plain, _ = alone.run(texts.batches, find, value_of, rows, journal, "filter")
    return [
        str(head)
        for head, value in zip(every, values[:, 0, 0].mean(-1), strict=True)
        if value >= plain.mean()
    ]


def _keeps(given: str | Sequence[float]) -> list[float]:
    try:
        found = [
            float(part) for part in (given.replace(",", " ").split() if isinstance(given, str) else given)
        ]
    except (TypeError, ValueError):
        raise AnalysisError(f"keep={given!r} is not a list of numbers; give for instance '0 0.5'") from None
    if not found or not all(0 <= number <= 1 for number in found) or len(set(found)) < len(found):
        raise AnalysisError(f"keep={given!r} is outside its limits; give different numbers from 0 to 1")
    return found


def _sets(model: HookedModel, given: HeadNames | Mapping[str, Any]) -> dict[str, Tensor]:
    """Head sets by name, bool [layer, head]."""
    if isinstance(given, str):
        parts = [part.strip() for part in given.split(";") if part.strip()]
        sets: Mapping[str, Any] = {
            part: part if part == "all" else named(part, model.layers, model.n_heads) for part in parts
        }
    else:
        sets = given if isinstance(given, Mapping) else {" ".join(map(str, given)): given}
    found = {str(name): _mask(model, heads) for name, heads in sets.items()}
    empty = [name for name, mask in found.items() if not mask.any()]
    if not found or empty or FILTERED in found:
        what = f"the set {empty[0]!r} is empty" if empty else f"{given!r} names no set, or one {FILTERED!r}"
        raise AnalysisError(f"heads: {what}; give 'all', or heads such as '1.0 1.2', sets apart by ;")
    return found


def _mask(model: HookedModel, heads: Any) -> Tensor:
    picked = chosen(heads, "all", model.layers, model.n_heads)
    none = torch.zeros(model.n_heads, dtype=torch.bool)
    return torch.stack([picked.get(layer, none) for layer in model.layers])


def _names(model: HookedModel, mask: Tensor) -> list[str]:
    return [str(Head(model.layers[layer], head)) for layer, head in mask.nonzero().tolist()]


def _digest(texts: Texts) -> str:
    """A digest of the token ids of all texts, in their order, and of their further inputs."""
    rows: dict[int, list[object]] = {}
    for batch in texts.batches:
        for n, place in enumerate(batch.places):
            row = as_tokens(batch.rows([n]))
            rows[place] = row.ids[0].tolist() + [[name, given.tolist()] for name, given in row.more.items()]
    return digest_of([rows[place] for place in sorted(rows)])
