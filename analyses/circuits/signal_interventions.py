"""What a head's signal to another head does: it is removed or doubled, and compared with signals of random slices.

The interventions of sparse attention decomposition (Franco & Crovella 2024, arXiv 2410.00340). "global" edits the
output of the sender's attention layer, which every later part reads; "local" edits the query or key of one reader
alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from headwater.analyses._catalogue.analysis import analysis
from headwater.analyses._catalogue.settings import Bounds
from headwater.analyses._measures.measure import (
    AnswerSetting,
    Explained,
    Measure,
    PositionSetting,
    WrongSetting,
)
from headwater.analyses._prompts.examples import Batch, Examples, singles_of
from headwater.analyses._prompts.positions import place_of
from headwater.analyses._runs.replace_activations import Swap
from headwater.analyses._streams.score_slices import Form, Forms, Prompt, used
from headwater.analyses.circuits._signal_tracing import Source, heads_of, sources_of
from headwater.lens.errors import AnalysisError
from headwater.lens.model import HookedModel
from headwater.lens.naming.heads import Head
from headwater.lens.progress import progress


@analysis
def signal_interventions(
    model: HookedModel,
    examples: Examples,
    reader: Annotated[str | None, "head that looks; none: of the last layer, the surest of its key"] = None,
    sender: Annotated[str | None, "earlier head; none: the one whose signal is longest"] = None,
    side: Annotated[Literal["q", "k"], "what the signal goes into"] = "k",
    how: Annotated[Literal["ablate", "boost"], "take the signal out, or add it once more"] = "ablate",
    where: Annotated[Literal["global", "local"], "for all who read it, or for the reader alone"] = "global",
    factor: Annotated[float, "how often the signal is taken out or added", Bounds(0.0)] = 1.0,
    slices: Annotated[float, "share of the score that the slices used must exceed", Bounds(0.0, 1.0)] = 1.0,
    constant: Annotated[bool, "count the 1 beside the output"] = False,
    draws: Annotated[int, "controls with random slices", Bounds(1)] = 8,
    seed: Annotated[int, "seed of the random slices", Bounds(0)] = 0,
    measure: Measure | None = None,
    answer: AnswerSetting = None,
    wrong: WrongSetting = None,
    position: PositionSetting = -1,
    source: Source = None,
) -> xr.Dataset:
    """Change the signal of `sender` to `reader` on the pair (`position`, `source`), once per prompt.

    The signal is the projection of the sender's output onto the span of the slices that the reader's score uses. For
    "q" it is taken at `position` from their query sides, for "k" at `source` from their key sides. `source` defaults to
    the key with the largest weight other than the first token. The constant is left out, and the mean over features is
    removed where the norm removes it. "global" adds ∓factor·signal to the attention's output, "local"
    ∓factor·signal·W/scale to the reader's query or key. Controls draw as many of the reader's other slices (all of them
    where fewer are left).

    Dataset over batch: `change` of the measure (the logit of `answer`, minus that of `wrong`) and `score_change` of the
    reader on the pair, with `change_random` and `score_change_random` [batch, draw]; `cosine` and `norm_ratio` of the
    sender's output after to before; `weight`, the reader's attention on the pair; `key`; `slices`, how many are used.
    "local" with "k" is refused where heads share keys.

    Question: What does one head's signal to another head do?
    Unit: change of the measure, and of the reader's score (as the model scales it).
    Source: Franco & Crovella 2024, arXiv:2410.00340; compared with the authors' code.
    Cost: four passes per prompt, one of them of 1 + `draws` copies.
    Not for: heads that stand in for each other; a signal of which the random slices hold as much.

    >>> import headwater as hw
    >>> model = hw.load("tasks-4l")
    >>> text = "When Mary and John went to the store , John gave a drink to"
    >>> found = hw.analyses.signal_interventions(model, text, reader="3.1", sender="1.3", draws=2)
    >>> found.attrs["reader"], found.score_change_random.dims, round(found.score_change.item())
    ('3.1', ('batch', 'draw'), -1)
    """
    if where == "local" and side == "k" and model.n_kv_heads != model.n_heads:
        raise AnalysisError(
            f'heads of {model.name} share keys, so that one reader\'s can not be changed; give where="global"'
        )
    prompts = singles_of(model, examples)
    sources = sources_of(source, len(prompts))
    forms = Forms(model, prompts)
    explained = Explained(model, measure, answer, wrong, position, "logit", of_classes=True)
    generator = torch.Generator().manual_seed(seed)
    rows, chosen = [], (reader, sender)
    for place, ids in enumerate(progress(prompts, desc="signals", unit="prompt")):
        pair = _Pair.of(
            forms, forms.run(ids), chosen, side, place, position, sources[place], slices, constant
        )
        chosen = (str(pair.reader), str(pair.sender))  # the first prompt's choice holds for all
        signals = pair.signals(draws, generator) * (-factor if how == "ablate" else factor)
        values, scores = _run(model, pair, signals, where, explained, place)
        rows.append(_row(pair, signals[0], values, scores))
    names = {name: ("batch", "draw") if name.endswith("random") else ("batch",) for name in rows[0]}
    return xr.Dataset(
        {name: (dims, np.array([row[name] for row in rows])) for name, dims in names.items()},
        coords={"batch": np.arange(len(rows)), "draw": np.arange(draws)},
        attrs={"reader": chosen[0], "sender": chosen[1], **explained.settings},
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class _Pair:
    """A reader on a pair of positions, a sender at one of them, and the slices that the reader's score uses."""

    prompt: Prompt
    form: Form
    reader: Head
    sender: Head
    side: str
    query: int
    key: int
    output: Tensor  # of the sender, augmented, not divided by the norm's scale [d_model + 1]
    axes: Tensor  # one side of all slices [slice, d_model + 1]
    used: Tensor

    @classmethod
    def of(
        cls, forms: Forms, prompt: Prompt, named: tuple[str | None, str | None], side: str, number: int, query: int,
        key: int | None, share: float, constant: bool,
    ) -> _Pair:  # fmt: skip
        model = forms.model
        query = place_of(query, prompt.length, f"prompt {number}")
        if prompt.length < 2 or (query == 0 and model.causal):
            raise AnalysisError(f"prompt {number} has no key but the first token at position {query}")
        last = prompt.pattern[max(model.layers)][:, query, 1:]
        surest = Head(max(model.layers), int(last.amax(-1).argmax()))
        reader = surest if named[0] is None else heads_of(model, named[0])[0]
        if key is None:
            key = int(prompt.pattern[reader.layer][reader.head, query, 1:].argmax()) + 1
        key = place_of(key, prompt.length, f"prompt {number}", "source")
        form = forms.layers[reader.layer]
        parts = form.slices(reader.head, query, key)
        x = prompt.x[reader.layer]
        chosen = used(parts.terms(x[query], x[key]), share)
        axes, place = (parts.left, query) if side == "q" else (parts.right, key)
        earlier = [h for h in heads_of(model, None) if h.layer < reader.layer]
        sent = [heads_of(model, named[1])[0]] if named[1] is not None else earlier
        if not sent or sent[0].layer >= reader.layer:
            raise AnalysisError(
                f"no head speaks before {reader}; name a sender in a layer before that of the reader"
            )
        nodes = [forms.wiring.number[str(head)] for head in sent]
        spoken = prompt.spoken(nodes, reader.layer, place, form, constant) * prompt.scale[reader.layer][place]
        spoken[:, -1] = float(constant)
        longest = int((spoken @ axes[chosen].mT).norm(dim=-1).argmax())
        return cls(prompt, form, reader, sent[longest], side, query, key, spoken[longest], axes, chosen)

    @property
    def place(self) -> int:
        return self.query if self.side == "q" else self.key

    def signals(self, draws: int, generator: torch.Generator) -> Tensor:
        """The signal, and the signals of random slices: [1 + draw, d_model]."""
        others = [n for n in range(len(self.axes)) if n not in self.used.tolist()]
        found = [self._in(self.used)]
        for _ in range(draws):
            order = torch.randperm(len(others), generator=generator)[: len(self.used)]
            found.append(self._in(torch.tensor(others, dtype=torch.long)[order]))
        return torch.stack(found)

    def _in(self, chosen: Tensor) -> Tensor:
        axes = self.axes[chosen]
        found = ((axes @ self.output) @ axes)[:-1]
        return found - found.mean() if self.form.centred else found


def _run(
    model: HookedModel, pair: _Pair, signals: Tensor, where: str, explained: Explained, place: int
) -> tuple[Tensor, Tensor]:
    """The measure and the reader's score, unchanged and with each signal, [1 + 1 + draw]."""
    changes = torch.cat([torch.zeros_like(signals[:1]), signals])
    layer, head = pair.reader
    scores: list[Tensor] = []

    def note(found: Tensor, hook: Any) -> None:
        scores.append(found[:, head, pair.query, pair.key])

    def everywhere(output: Tensor, hook: Any) -> Tensor:
        output[:, pair.place] += changes.to(output)
        return output

    def at_reader(features: Tensor, hook: Any) -> Tensor:
        read = pair.form.query if pair.side == "q" else pair.form.key
        features[:, pair.place, head] += (
            changes / pair.prompt.scale[layer][pair.place] @ read[head, :-1]
        ).to(features)
        return features

    change = {
        "global": (f"blocks.{pair.sender.layer}.hook_attn_out", everywhere),
        "local": (f"blocks.{layer}.attn.hook_{pair.side}", at_reader),
    }[where]
    batch = Batch(pair.prompt.ids, [place])
    value = explained.of(batch)
    forward = dict([change, (f"blocks.{layer}.attn.hook_attn_scores", note)])
    logits = Swap(model, len(changes), forward=forward).logits(batch.copies(len(changes)).ids, None)
    found = value(logits, torch.zeros(len(changes), dtype=torch.long))
    return found.double().cpu(), scores[0].double().cpu()


def _row(pair: _Pair, signal: Tensor, values: Tensor, scores: Tensor) -> dict[str, Any]:
    before, after = pair.output[:-1], pair.output[:-1] + signal
    return {
        "change": float(values[1] - values[0]),
        "change_random": (values[2:] - values[0]).numpy(),
        "score_change": float(scores[1] - scores[0]),
        "score_change_random": (scores[2:] - scores[0]).numpy(),
        "cosine": float(torch.cosine_similarity(before, after, 0)),
        "norm_ratio": float(after.norm() / before.norm()),
        "weight": float(pair.prompt.pattern[pair.reader.layer][pair.reader.head, pair.query, pair.key]),
        "key": pair.key,
        "slices": len(pair.used),
    }
