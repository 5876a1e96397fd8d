"""The score of a model's output that an analysis explains: a token's log-probability, a difference, or the user's
measure.

Rows of a batch may be edited copies of one text. The answer of a text is therefore fixed once, on the unedited text,
and used for every copy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from headwater.analyses._prompts.examples import Batch, check_function, one_each, outputs_of, refuse_infinite
from headwater.analyses._prompts.positions import place_of
from headwater.lens.errors import AnalysisError
from headwater.lens.model import HookedModel
from headwater.lens.models.classes import is_span
from headwater.lens.models.signature import compares
from headwater.lens.models.token_ids import class_id, token_id

Measure = Callable[
    [Tensor], Tensor
]  # what `outputs_of` gives: logits of tokens or classes, similarities, or last hidden states → one value per row
Answer = str | int | Sequence[str] | Sequence[int]
Kind = Literal["log_probability", "probability", "logit"]
CountedKind = Literal[
    "log_probability", "probability", "logit", "correct"
]  # "correct" has no gradient, so analyses that take one do not offer it

# the settings that every analysis of an output takes, with their help lines
AnswerSetting = Annotated[
    Answer | None, "token or class asked about, one or one per text; none: what the model predicts"
]
WrongSetting = Annotated[Answer | None, "token or class to compare with; the difference is then explained"]
PositionSetting = Annotated[
    int,
    "token position whose prediction is explained, in a masked language model the mask's; not for one class of a text",
]
KindSetting = Annotated[Kind, "what is read off for a token or class; a single score is read as it is"]
CountedKindSetting = Annotated[
    CountedKind, "what is read off for a token or class; correct: 1 where it has the largest logit, else 0"
]


@dataclass(frozen=True, eq=False)
class Explained:
    """The settings of a score: `measure`, or `kind` of the answer (minus that of the wrong one) at `position`.

    The answer is a token, or with `of_classes` a class of a classifier. A model of one score (`num_labels` 1) is
    explained by the score itself, and two towers (CLIP) by the cosine similarity of each example's own text and
    picture; they take no answer. In an encoder–decoder `position` counts the decoder's tokens. Where a text may have
    several classes (`problem_type` "multi_label_classification") a probability is of its class alone, and not shared
    out.
    """

    model: HookedModel
    measure: Measure | None
    answer: Answer | None
    wrong: Answer | None
    position: int
    kind: CountedKind
    of_classes: bool = False

    def __post_init__(self) -> None:
        check_function(self.measure, "measure", ("outputs",))
        if self.measure is not None and (self.answer is not None or self.wrong is not None):
            raise AnalysisError("measure and answer ask for different things; give one of them")
        if self.measure is not None or self.model.has_lm_head or (self.of_classes and self.model.classes):
            return
        if compares(self.model.hf):
            if self.answer is not None or self.wrong is not None:
                raise AnalysisError(
                    f"{self.model.name} has no answers: what is explained is how similar each text and its own picture "
                    "are; leave answer and wrong out, or give a measure"
                )
            return
        if self.of_classes:
            raise AnalysisError(
                f"{self.model.name} has no language head; give measure(hidden) → [batch], of its last hidden states"
            )
        raise AnalysisError(
            f"{self.model.name} has no language head, so there is no token's logit to explain"
        )

    @property
    def settings(self) -> dict[str, Any]:
        """For the attributes of a result."""
        if self.measure is not None:
            return {"measure": getattr(self.measure, "__name__", str(self.measure))}
        if compares(self.model.hf):
            return {"measure": "similarity"}
        return {"answer": self.answer, "wrong": self.wrong, "position": self.position, "kind": self.kind}

    def ids_of(self, what: Literal["answer", "wrong"], batch: Batch) -> list[int] | None:
        """The ids of the answers (or wrong tokens) of the texts of a batch, in batch order; None if not given."""
        given = self.answer if what == "answer" else self.wrong
        return None if given is None else self._ids(given, what, batch).tolist()

    def of(self, batch: Batch, plain: Tensor | None = None) -> Callable[[Tensor, Tensor], Tensor]:
        """`value(outputs, texts)`: one number per row of `outputs`; row n is a copy of text `texts[n]` of the batch.

        `plain` are the outputs for the unedited texts; without them the model runs once. They give the default answer,
        and the measure must be finite on them.
        """
        if plain is None:
            plain = outputs_of(self.model)(batch.ids)
        count, length = batch.ids.shape
        place_of(self.position, length, f"example {batch.places[0]}")
        asked = None if self.answer is None else self._ids(self.answer, "answer", batch)
        against = None if self.wrong is None else self._ids(self.wrong, "wrong", batch)
        measure = torch.Tensor.double if compares(self.model.hf) and self.measure is None else self.measure
        if asked is None and measure is None:
            asked = self._row(plain).argmax(-1)

        def value(outputs: Tensor, texts: Tensor) -> Tensor:
            if asked is None:
                assert measure is not None
                return measure(outputs)
            return self._read(outputs, asked, against, texts)

        first = one_each(value(plain, torch.arange(count)), count, "measure", "row")
        refuse_infinite(first, "the measure of example", batch.places)
        return value

    def _read(self, logits: Tensor, asked: Tensor, against: Tensor | None, texts: Tensor) -> Tensor:
        logits = logits if logits.dtype == torch.float64 else logits.float()
        if self.kind != "logit" and is_span(self.model.hf, self.model.classes):
            logits = logits.log_softmax(1)  # over the positions where the answer may start or end
        row = self._row(logits)
        if self.kind == "correct":
            row = torch.nn.functional.one_hot(row.argmax(-1), row.shape[-1]).double()
        elif self.kind != "logit" and not self._is_score(row.shape[-1]):
            row = self._log_shares(row, self._of_text(logits))
            row = row.exp() if self.kind == "probability" else row
        texts = texts.to(row.device)
        found = row.gather(1, asked.to(row.device)[texts][:, None])[:, 0]
        if against is None:
            return found
        return found - row.gather(1, against.to(row.device)[texts][:, None])[:, 0]

    def _row(self, logits: Tensor) -> Tensor:
        """The logits that are read, [row, token or class]."""
        if logits.dim() == 2 and not self._of_text(logits):
            logits = logits[..., None]  # one score for each token
        return logits if logits.dim() == 2 else logits[:, self.position]

    def _of_text(self, logits: Tensor) -> bool:
        """Whether logits are of whole texts, [row, class], and not of each token."""
        return logits.dim() == 2 and logits.shape[1] == len(self.model.classes)

    def _is_score(self, width: int) -> bool:
        """Whether there is one number, as from a reward model, or numbers that are no logits of classes."""
        kind = getattr(self.model.hf.config, "problem_type", None)
        return not self.model.has_lm_head and (width == 1 or kind == "regression")

    def _log_shares(self, row: Tensor, of_text: bool) -> Tensor:
        """Log-probabilities of tokens or classes, [row, token or class]."""
        if is_span(self.model.hf, self.model.classes):
            return row
        kind = getattr(self.model.hf.config, "problem_type", None)
        alone = not self.model.has_lm_head and of_text and kind == "multi_label_classification"
        return torch.nn.functional.logsigmoid(row) if alone else row.log_softmax(-1)

    def _ids(self, given: Answer, what: str, batch: Batch) -> Tensor:
        """The token of each text of the batch, [text]."""
        single = isinstance(given, str | Integral) or (isinstance(given, Tensor) and given.dim() == 0)
        each: list[Any] = [given] if single else list(given)  # type: ignore[arg-type]
        read = token_id if self.model.has_lm_head else class_id
        ids = [read(self.model, one, what) for one in each]
        if batch.of is not None and len(ids) > max(1, batch.of):
            raise AnalysisError(
                f"{what} holds {len(ids)} tokens for {batch.of} text{'s' * (batch.of > 1)}; give one, or one per text"
            )
        if len(ids) == 1:
            return torch.tensor(ids * len(batch.places))
        if len(ids) <= max(batch.places):
            raise AnalysisError(
                f"{what} holds {len(ids)} tokens for {max(batch.places) + 1} or more texts; give one per text"
            )
        return torch.tensor([ids[place] for place in batch.places])
