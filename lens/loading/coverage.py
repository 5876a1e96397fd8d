"""How well Headwater supports an architecture, measured against transformers' eager attention on the same weights.

`measure` runs both models without padding, with padding, and in generation with a dynamic and a static cache. It
compares recorded weights with `output_attentions`, and checks that an edit of attention and an edit of heads change the
output. Every difference is the largest absolute one over real tokens, of the logits or else the last hidden state.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from logging import ERROR, getLogger
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.utils import logging

from headwater.lens.edits import ScaleHeads, Temperature
from headwater.lens.errors import EditError, HeadwaterError, ModelError, PromptError
from headwater.lens.loading import coverage_forms, zoo
from headwater.lens.loading.load import load
from headwater.lens.model import HookedModel
from headwater.lens.models import declared_rules, signature
from headwater.lens.models.closeness import answer
from headwater.lens.models.embedded import embedded
from headwater.lens.models.parts import Part
from headwater.lens.trained.registry import added_folder, is_added

TOLERANCE, MAPS, MOVED = (
    2e-5,
    2e-5,
    1e-4,
)  # allowed for outputs of size 1, and for weights; the least effect of an edit
NEW = 8  # tokens to generate: enough for windows to slide and static caches to fill
GENERATING = ("decoder", "seq2seq", "speech", "chat")
Inputs = dict[str, Any]  # tensors, under transformers' names


@dataclass
class Row:
    """One line of the table. Numbers are largest differences; None: the architecture has no such case.

    `refusal` is the line that `load` refused the model with, or "". A row that is refused has no numbers.
    """

    title: str
    model: str
    parts: str
    plain: float | None = None
    right: float | str | None = None
    left: float | str | None = None
    cache: float | str | None = None
    static: float | str | None = None
    maps: float | None = None
    attention_edit: float | str | None = None
    head_edit: float | str | None = None
    faults: list[str] = field(default_factory=list)
    refusal: str = ""


def names() -> list[str]:
    """Every family of the zoo, and the trained models on this machine."""
    return [*zoo.FAMILIES, *zoo.FORMS, *_trained()]


def measure_all() -> Iterator[Row]:
    """The rows one by one, without the logs and progress bars of other packages."""
    with quiet():
        for name in names():
            yield measure(name)


@contextmanager
def quiet() -> Iterator[None]:
    """Switch off what transformers and bitsandbytes log, and use one thread: on models this small, more are slower."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    quantisation = getLogger("bitsandbytes")
    level, threads = quantisation.level, torch.get_num_threads()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    quantisation.setLevel(ERROR)
    try:
        yield
    finally:
        quantisation.setLevel(level)
        torch.set_num_threads(threads)
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def measure(name: str) -> Row:
    """The row of one family of the zoo, or of one trained model."""
    if name in zoo.KNOWN:
        family = zoo.KNOWN[name]
        try:
            reference = zoo.build(name)
            hooked = load(zoo.build(name))  # a copy of 4-bit weights that never ran can not run
        except HeadwaterError as error:
            return Row(family.title, family.model, str(error).replace("|", "\\|"), refusal=str(error))
        given = zoo.inputs(name) if name in zoo.FAMILIES else coverage_forms.first_taken(reference)
        return _Trial(family.title, family.kind, reference, hooked, given, family.static).run()
    folder = _trained()[name]
    hooked = load(folder)
    kind = getattr(transformers, type(hooked.hf).__name__)
    reference = kind.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
    words = hooked.to_tokens(["one two three four five six seven eight nine ten eleven"] * 2)
    given = {"input_ids": words.ids, "attention_mask": words.mask.long()}
    return _Trial(
        f"{name} (trained)", "decoder" if hooked.causal else "encoder", reference, hooked, given
    ).run()


def _trained() -> dict[str, Path]:
    """Trained models of text on this machine, without the ones whose declared rule transformers does not know.

    Those of pictures, and classifiers, which are sure of words that they do not know, are of families that have rows.
    """
    found = {name: Path(about["path"]) for name, about in embedded().items() if about["reads"] == "text"}
    found = {name: path for name, path in found.items() if not declared_rules.declared(path)}
    found = {name: path for name, path in found.items() if "Classification" not in _architecture(path)}
    if is_added("minilm"):
        found["MiniLM"] = added_folder("minilm")
    return found


def _architecture(folder: Path) -> str:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))["architectures"][0]


def _heads(part: Part) -> str:
    """ "4", "4/2" with the key–value heads where they are fewer, and "4/1+2" where layers differ."""
    heads, shared = ({shape[n] for shape in part.shapes.values()} for n in (0, 1))
    counts = "+".join(map(str, sorted(heads)))
    return counts if shared == heads else f"{counts}/{'+'.join(map(str, sorted(shared)))}"


@dataclass
class _Trial:
    title: str
    kind: str
    reference: Any
    hooked: HookedModel
    given: Inputs
    static: bool = True

    def run(self) -> Row:
        stacks = (f"{name} {len(part.modules)}×{_heads(part)}" for name, part in self.hooked.parts.items())
        left_out = f"; not covered: {'; '.join(self.hooked.unread)}" if self.hooked.unread else ""
        row = Row(self.title, type(self.hooked.hf).__name__, ", ".join(stacks) + left_out)
        if self.kind == "form":
            return self._form(row)
        row.plain = self._difference(self.given)
        if "attention_mask" in self.given:
            row.right, row.left = (self._behind_padding(side) for side in ("right", "left"))
        if self.kind in GENERATING:
            row.cache = self._generation({})
            row.static = self._generation({"cache_implementation": "static"}) if self.static else None
        row.maps = self._maps(_padded(self.given, "right"))
        row.attention_edit, row.head_edit = self._edits()
        self._judge(row, float(_eager(self.reference, self.given).abs().max()), MOVED)
        return row

    def _form(self, row: Row) -> Row:
        given = self.reference, self.hooked, self.given
        row.plain, row.maps = coverage_forms.difference(*given), coverage_forms.map_difference(*given)
        row.attention_edit, row.head_edit = coverage_forms.moved_by_edits(self.hooked, self.given)
        self._judge(row, coverage_forms.size(self.reference, self.given), least=0.0)
        return row

    def _difference(self, given: Inputs) -> float:
        expected = _eager(self.reference, given)
        found = _hooked(self.hooked, given)
        return _largest(expected, found, _real(given, expected))

    def _behind_padding(self, side: str) -> float | str:
        """The difference with padding; "refused" where it changes what transformers' model gives for a text."""
        try:
            return self._difference(_padded(self.given, side))
        except PromptError:
            return "refused"

    def _generation(self, options: dict[str, Any]) -> float | str:
        """The difference of the logits of every step, with padding on the left; infinite if the tokens differ."""
        given = _padded(self.given, "left")
        given.pop("decoder_input_ids", None)
        settings = {
            "max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "output_logits": True,
            "return_dict_in_generate": True, "pad_token_id": 0, "eos_token_id": 2, **options,
        }  # fmt: skip
        with torch.no_grad():
            expected = self.reference.generate(**given, **settings)
            try:
                found = self.hooked.hf.generate(**given, **settings)
            except HeadwaterError:
                return "refused"
        if not expected.sequences.equal(found.sequences):
            return float("inf")
        pairs = zip(expected.logits, found.logits, strict=True)
        return max(float((a - b).abs().max()) for a, b in pairs)

    def _maps(self, given: Inputs) -> float:
        """The difference of recorded weights from `output_attentions`; infinite if a part was not recorded."""
        ids, mask, more = _split(given)
        record = self.hooked.record(ids, mask, **more)
        records = {next(iter(self.hooked.parts)): record, **record.parts}
        worst = 0.0
        for name, weights in attentions(self.reference, given).items():
            part = records.get(name)
            if part is None:
                return float("inf")
            found = [part.pattern(layer) for layer in part.layers]
            # MiniMax lists the states of its linear attention among the weights
            weights = [dense for dense in weights if dense.shape == found[0].shape]
            if len(weights) != len(found):
                return float("inf")
            for pattern, dense in zip(found, weights, strict=True):
                difference = (pattern - dense).abs() * part.valid[:, None, :, None]
                worst = max(worst, float(difference.max()))
        return worst if set(records) == set(self.hooked.parts) else float("inf")

    def _edits(self) -> tuple[float | str, float | str]:
        """The smallest change of the output, over parts, by an edit of attention and by an edit of heads."""
        plain = _hooked(self.hooked, self.given)
        moved: list[list[float]] = [[], []]
        for name in self.hooked.parts:
            part = self.hooked.part(name)
            for place, edit in enumerate((Temperature(2.0), ScaleHeads({f"{part.layers[0]}.0": 0.0}))):
                try:
                    with part.edit(edit):
                        moved[place].append(float((_hooked(self.hooked, self.given) - plain).abs().max()))
                except EditError:
                    return "refused", "refused"
        return min(moved[0]), min(moved[1])

    def _judge(self, row: Row, size: float, least: float) -> None:
        """Name what is wrong, for outputs of this size; `least` is what an edit must change."""
        size = max(1.0, size)
        for what in ("plain", "right", "left", "cache", "static"):
            value = getattr(row, what)
            if isinstance(value, float) and not value <= TOLERANCE * size:
                row.faults.append(f"{what}: outputs differ by {value:.0e}")
        if row.maps is None or not row.maps <= MAPS:
            row.faults.append(f"maps: recorded weights differ by {row.maps:.0e}")
        for what, value in (("attention edit", row.attention_edit), ("head edit", row.head_edit)):
            if value == "refused" and self.hooked.read_only:
                continue
            if not isinstance(value, float) or not value > least:
                row.faults.append(f"{what}: changes nothing")


def _split(given: Inputs) -> tuple[Tensor | None, Tensor | None, Inputs]:
    more = {name: value for name, value in given.items() if name not in ("input_ids", "attention_mask")}
    return given.get("input_ids"), given.get("attention_mask"), more


def _hooked(model: HookedModel, given: Inputs) -> Tensor:
    ids, mask, more = _split(given)
    try:
        return model(ids, mask, **more)
    except ModelError:  # no logits of any kind
        return model.embeddings(ids, mask, **more)


def _eager(model: Any, given: Inputs) -> Tensor:
    """The output of the eager model; `position_ids` count from the first real token, as in transformers' `generate`.

    RoBERTa and models like it count so by themselves, from the id of padding.
    """
    given = dict(given)
    mask = given.get("attention_mask")
    known = inspect.signature(model.forward).parameters
    counts = signature.first_position(model) > 0
    if mask is not None and not mask[:, 0].all() and "position_ids" in known and not counts:
        given["position_ids"] = (mask.cumsum(-1) - 1).clamp_min(0)
    with torch.no_grad():
        return answer(model(**given))


def _padded(given: Inputs, side: str) -> Inputs:
    """The same inputs with four positions of padding in the second row."""
    found = dict(given)
    if "attention_mask" in found:
        mask = found["attention_mask"].clone()
        if side == "right":
            mask[1, -4:] = 0
        else:  # shift the row to the right, so that image tokens stay together
            ids = found["input_ids"].clone()
            ids[1, 4:], mask[1, :4] = found["input_ids"][1, :-4], 0
            found["input_ids"] = ids
        found["input_ids"] = found["input_ids"].masked_fill(mask == 0, 0)
        found["attention_mask"] = mask
    return found


def _real(given: Inputs, output: Tensor) -> Tensor | None:
    mask = given.get("attention_mask")
    return mask.bool() if mask is not None and output.shape[:2] == mask.shape else None


def _largest(expected: Tensor, found: Tensor, real: Tensor | None) -> float:
    difference = (expected - found).abs()
    return float((difference if real is None or difference.dim() < 3 else difference[real]).max())


def attentions(model: Any, given: Inputs) -> dict[str, tuple[Tensor, ...]]:
    """The dense weights of the eager model by part: [batch, head, query, key] of each layer."""
    with torch.no_grad():
        out = model(**given, output_attentions=True)
        towers = {n: getattr(out, f"{n}_model_output", None) for n in ("text", "vision")}
        found = {n: tower.attentions for n, tower in towers.items() if tower is not None}
        if getattr(out, "cross_attentions", None):
            found = {n: getattr(out, f"{n}_attentions") for n in ("decoder", "encoder", "cross")}
        if found:
            return found
        name = "audio" if "input_values" in given else "vision" if "input_ids" not in given else "text"
        found = {name: out.attentions}
        if "input_ids" in given and "pixel_values" in given:
            tower = model.model.vision_tower
            found["vision"] = tower(given["pixel_values"], output_attentions=True).attentions
    return found
