"""What each analysis is given in the matrix: a subject made from a family of the zoo, and small settings.

A `Subject` is a small random model with inputs of its kind. Answers are token ids, so that no tokenizer is needed; a
model without logits over a vocabulary is asked by a measure and a loss of its outputs.
"""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from headwater.analyses._catalogue.catalogue import Entry, entry
from headwater.lens.loading import zoo
from headwater.lens.loading.load import load
from headwater.lens.model import HookedModel
from headwater.lens.models.axes import TEXTS as TEXT_AXES
from headwater.lens.naming.tokens import Tokens
from headwater.lens.records.record import Record

TEXTS, LENGTH = 4, 9  # no length is the width of a head
ANSWER, WRONG = 11, 23  # token ids
SMALL: dict[str, Any] = {"draws": 10, "controls": 1, "sequences": 2, "length": 6}
# settings by analysis, where the defaults are for larger models or need to be named
SETTINGS: dict[str, dict[str, Any]] = {
    "align_subspace": {"layers": 0, "steps": 1, "controls": 1},
    "agreement": {"methods": "raw_attention rollout"},
    "attention_knockout": {"routes": "image->answer", "length": 1},
    "attribution_truth": {"steps": 2},
    "composition": {"draws": 4},
    "factual_recall": {"draws": 100},
    "faithfulness": {"methods": "raw_attention rollout", "steps": 2},
    "find_sinks": {"length": None, "min_queries": 1},
    "fit_offsets": {"steps": 2, "count": 1},
    "head_relevance": {"concepts": "digit: one; place: left"},
    "image_compression": {"keep": "0, 1", "length": 1},
    "head_significance": {"draws": 3000},
    "head_weakening": {"concept": "digit", "concepts": "digit: one; place: left"},
    "integrated_gradients": {"steps": 32, "tolerance": 0.2},
    "kv_curve": {"kept": "0.5, 1", "window": 1, "sinks": 1, "future": 4, "draws": 1},
    "kv_needles": {
        "lengths": 30,
        "depths": 2,
        "material": "tokens",
        "kept": "0.5",
        "window": 1,
        "sinks": 1,
        "draws": 1,
    },
    "kv_scores": {"window": 3, "sinks": 1, "future": 4},
    "learn_gates": {"steps": 2},
    "localize_heads": {"steps": 2},
    "prune_heads": {"step": 0.5},
    "retrieval_heads": {"lengths": 30, "depths": 2, "material": "tokens"},
    "suppressors": {"draws": 100},
    "word_ranks": {"methods": "raw_attention rollout", "words": "#9 #15 #20 0,1"},
    "token_divergence": {"length": 2},
}


@dataclass(frozen=True, eq=False)
class Subject:
    """A model of the zoo, or one part of it, and what it reads: `given` are all inputs under transformers' names."""

    name: str
    part: str
    model: HookedModel
    given: dict[str, Tensor]

    @functools.cache  # noqa: B019 - a subject lives as long as its row of the matrix
    def record(self, keep: tuple[str, ...]) -> Record:
        """The record of the part."""
        more: dict[str, Any] = dict(self.given)
        ids, mask = more.pop("input_ids", None), more.pop("attention_mask", None)
        return self.model.record(ids, mask, keep=keep, **more)

    @property
    def reads(self) -> str:
        """The name of the input that examples are given as: the text if the model reads one, else images or sound."""
        return "input_ids" if "input_ids" in self.given else next(iter(self.given))

    @property
    def examples(self) -> Tensor:
        """What the analyses of examples take: a plain tensor, or `Tokens` where several inputs belong together."""
        if set(self.given) <= {self.reads, "attention_mask"}:
            return self.given[self.reads].clone()
        more: dict[str, Any] = dict(self.given)
        ids, mask = more.pop("input_ids", None), more.pop("attention_mask", None)
        return self.model.to_tokens(ids, mask, **more)

    @property
    def corrupt(self) -> Tensor:
        """The examples with another token in the middle, or turned around."""
        examples = self.examples
        if isinstance(examples, Tokens):
            more = {name: t.flip(-1) if t.is_floating_point() else t for name, t in examples.more.items()}
            if "input_ids" in more:
                more["input_ids"] = _other_middle(more["input_ids"])
            return examples.changed(examples.ids, examples.mask, more)
        return examples.flip(-1) if examples.is_floating_point() else _other_middle(examples)

    @property
    def pairs(self) -> list[tuple[Any, Any]]:
        sides = self.examples, self.corrupt
        if isinstance(sides[0], Tokens):
            rows = range(len(sides[0]))
            return [tuple(side.rows([row]) for side in sides) for row in rows]  # type: ignore[attr-defined]
        if sides[0].is_floating_point():  # each picture or sound keeps its axis of rows
            return list(zip(*(side.split(1) for side in sides), strict=True))
        return list(zip(*sides, strict=True))


def _odd(valid: Tensor) -> Tensor:
    """Whether a position is odd, 0 or 1 [batch, position]."""
    return valid.long().cumsum(1) % 2


def _other_middle(ids: Tensor) -> Tensor:
    """Another token in the middle of each text."""
    changed = ids.clone()
    changed[:, LENGTH // 2] = (changed[:, LENGTH // 2] + 7) % 80 + 3
    return changed


def names() -> list[str]:
    """The rows of the matrix: every family, and the parts of some beside the main one."""
    found = []
    for name, family in zoo.FAMILIES.items():
        found.append(name)
        if name in ("t5", "bart", "whisper"):
            found += [f"{name}/encoder", f"{name}/cross"]
        elif family.kind in ("pair", "chat"):
            found.append(f"{name}/vision")
    return found


def subject(name: str) -> Subject:
    """The subject of a row. HeadwaterError if the model can not be opened or is not installed."""
    family, _, part = name.partition("/")
    given = zoo.inputs(family, lengths=(LENGTH,) * TEXTS)
    model = load(zoo.build(family))
    return Subject(name, part, model.part(part) if part else model, given)


def call(asked: Entry, of: Subject) -> Any:
    """Run one analysis on one subject."""
    settings = settings_of(asked, of.model)
    if asked.inputs == "record":
        record = of.record(asked.keep)
        if asked.name == "contrastive_qk":  # few texts repeat a token
            settings |= {"labels": _odd(record.valid), "key_labels": _odd(record.key_axis.valid)}
        return asked.function(record, **settings)
    if asked.inputs == "model":
        return asked.function(of.model, **settings)
    if asked.inputs == "circuits":
        return asked.function(*circuits(of), **settings)
    if asked.name in ("circuit_faithfulness", "circuit_curve"):
        return asked.function(of.model, None, of.pairs, **settings)
    if asked.inputs == "model+pairs":
        few = 2 if asked.name == "attribution_truth" else TEXTS  # it runs every edge
        return asked.function(of.model, of.pairs[:few], **settings)
    return asked.function(of.model, of.examples, **settings)


def circuits(of: Subject) -> tuple[Any, Any]:
    """Two circuits of the model, found by two methods."""
    attribute = entry("edge_attribution").function
    asked = {"answer": f"#{ANSWER}", "wrong": f"#{WRONG}", "draws": 10}
    return tuple(
        attribute(of.model, of.pairs, steps=1, how=how, **asked) for how in ("inputs", "clean_corrupt")
    )


def settings_of(asked: Entry, model: HookedModel) -> dict[str, Any]:
    """Small settings, an answer where the model writes tokens, and a measure and a loss where it does not."""
    known = parameters(asked)
    found = {name: value for name, value in SMALL.items() if name in known} | SETTINGS.get(asked.name, {})
    if model.has_lm_head:
        found |= {n: f"#{i}" for n, i in (("answer", ANSWER), ("wrong", WRONG)) if n in known}
    elif model.classes and "answer" in known:
        named = {"answer": 1, "wrong": 0} if len(model.classes) > 1 else {"answer": 0}
        found |= {name: place for name, place in named.items() if name in known}
    elif "measure" in known:
        found["measure"] = strength
    if asked.name == "head_contrast" and model.parts[model.part_name].keys not in ("text", "decoder"):
        found["how"] = "hide"
    if "blank" in known and model.parts[model.part_name].queries in TEXT_AXES:
        found["blank"] = "#3"
    if "loss" in known and not (model.has_lm_head and model.causal):
        found["loss"] = loss
    return found


def parameters(asked: Entry) -> tuple[str, ...]:
    """The names of all that an analysis can be given."""
    return tuple(inspect.signature(asked.function).parameters)


def strength(outputs: Tensor) -> Tensor:
    """One number for each row of a model's outputs: the first feature, of the last position if there are positions."""
    return outputs[:, -1, 0] if outputs.dim() == 3 else outputs.reshape(len(outputs), -1)[:, 0]


def loss(outputs: Tensor, tokens: Tensor) -> Tensor:
    """A smooth loss of the outputs of each row: squares of every second number, as norms fix the sum of all."""
    return outputs.reshape(len(outputs), -1)[:, ::2].square().mean(1)
