"""The score of a model's output that an analysis explains: a token's log-probability, a difference, or the user's
measure.

Rows of a batch may be edited copies of one text. The answer of a text is therefore fixed once, on the unedited text,
and used for every copy.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from headwater.analyses._prompts.examples import Batch, one_each, refuse_infinite
from headwater.analyses._prompts.positions import place_of
from headwater.lens.errors import AnalysisError
from headwater.lens.model import HookedModel
from headwater.lens.models.token_ids import token_id

Measure = Callable[
    [Tensor], Tensor
]  # logits, or last hidden states of a model without a head → one value per row
Answer = str | Sequence[str] | Sequence[int]
Kind = Literal["log_probability", "probability", "logit"]

# the settings that every analysis of an output takes, with their help lines
AnswerSetting = Annotated[
    Answer | None, "token asked about, one or one per text; none: what the model predicts"
]
WrongSetting = Annotated[Answer | None, "token to compare with; the difference is then explained"]
PositionSetting = Annotated[int, "token position whose prediction is explained"]
KindSetting = Annotated[Kind, "what is read off for a token"]


@dataclass(frozen=True, eq=False)
class Explained:
    """The settings of a score: `measure`, or `kind` of the answer (minus that of the wrong one) at `position`."""

    model: HookedModel
    measure: Measure | None
    answer: Answer | None
    wrong: Answer | None
    position: int
    kind: Kind

    def __post_init__(self) -> None:
        if self.measure is not None and (self.answer is not None or self.wrong is not None):
            raise AnalysisError("measure and answer ask for different things; give one of them")
        if self.measure is None and not self.model.has_lm_head:
            raise AnalysisError(
                f"{self.model.name} has no language head; give measure(hidden) → [batch], of its last hidden states"
            )

    @property
    def settings(self) -> dict[str, Any]:
        """For the attributes of a result."""
        if self.measure is not None:
            return {"measure": getattr(self.measure, "__name__", str(self.measure))}
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
            plain = self.model(batch.ids) if self.model.has_lm_head else self.model.embeddings(batch.ids)
        count, length = batch.ids.shape
        place_of(self.position, length, f"example {batch.places[0]}")
        asked = None if self.answer is None else self._ids(self.answer, "answer", batch)
        against = None if self.wrong is None else self._ids(self.wrong, "wrong", batch)
        if asked is None and self.measure is None:
            asked = plain[:, self.position].argmax(-1)

        def value(outputs: Tensor, texts: Tensor) -> Tensor:
            if asked is None:
                assert self.measure is not None
                return self.measure(outputs)
            return self._read(outputs, asked, against, texts)

        first = one_each(value(plain, torch.arange(count)), count, "measure", "row")
        refuse_infinite(first, "the measure of example", batch.places)
        return value

    def _read(self, logits: Tensor, asked: Tensor, against: Tensor | None, texts: Tensor) -> Tensor:
        row = logits[:, self.position]
        row = row if row.dtype == torch.float64 else row.float()
        if self.kind != "logit":
            row = row.log_softmax(-1)
        if self.kind == "probability":
            row = row.exp()
        texts = texts.to(row.device)
        found = row.gather(1, asked.to(row.device)[texts][:, None])[:, 0]
        if against is None:
            return found
        return found - row.gather(1, against.to(row.device)[texts][:, None])[:, 0]

    def _ids(self, given: Answer, what: str, batch: Batch) -> Tensor:
        """The token of each text of the batch, [text]."""
        each = [given] if isinstance(given, str) else list(given)
        ids = [token_id(self.model, one, what) for one in each]
        if len(ids) == 1:
            return torch.tensor(ids * len(batch.places))
        if len(ids) <= max(batch.places):
            raise AnalysisError(
                f"{what} holds {len(ids)} tokens for {max(batch.places) + 1} or more texts; give one per text"
            )
        return torch.tensor([ids[place] for place in batch.places])


def run_embedded(model: HookedModel, embedded: Tensor) -> Tensor:
    """Logits (or last hidden states) [batch, position, …] for word embeddings instead of ids, with gradients."""
    more = {"use_cache": False} if "use_cache" in inspect.signature(model.hf.forward).parameters else {}
    with torch.enable_grad() if embedded.requires_grad else torch.no_grad():
        found = model.hf(inputs_embeds=embedded, **more)
    return found.logits if model.has_lm_head else found.last_hidden_state


def embedded_tokens(model: HookedModel, ids: Tensor) -> Tensor:
    """The model's word embeddings of the tokens, [batch, position, d_model], without gradients."""
    with torch.no_grad():
        return model.hf.get_input_embeddings()(ids.to(model.device)).detach()
