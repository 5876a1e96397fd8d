"""Relevance through encoder, decoder and cross-attention: the rules of Chefer, Gur & Wolf 2021 for two streams.

With s for the decoder's tokens and q for the encoder's, only the asked rows of `R_ss` and `R_sq` are computed. These
rows are pulled down to every cross-attention. The factors on both sides of it, `rownorm(R - I)`, are applied to vectors
that go up through the layers of their own side. So no queries × keys matrix exists on either side, and each layer is
multiplied out twice. Only texts with equal lengths on both sides run together, so that nothing is padded.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from headwater.analyses._measures.measure import Explained
from headwater.analyses._prompts.examples import Batch, Examples, differentiable, outputs_of
from headwater.analyses._prompts.positions import Positions, place_of, position_coordinates
from headwater.analyses._prompts.texts import Texts, indicators
from headwater.analyses.tokens._gradients import Rooted, WeightSlopes, slopes_at
from headwater.kernels.maps.attention_map import AttentionMap
from headwater.lens.attention import context
from headwater.lens.errors import AnalysisError
from headwater.lens.model import HookedModel
from headwater.lens.models.axes import axis
from headwater.lens.naming.tokens import Tokens
from headwater.lens.records.contents import Axis
from headwater.lens.running.watching import Heads

SIDES = ("encoder", "decoder", "cross")
Step = tuple[str, WeightSlopes]  # "decoder" or "cross", in the order the model runs them


@dataclass(frozen=True, eq=False)
class Pairs:
    """The texts of both sides: `target` for the decoder, `source` the encoder's token ids and which are real."""

    tokens: Tokens
    source: Tokens
    source_strings: list[list[str]]
    target: Texts

    @classmethod
    def of(cls, model: HookedModel, examples: Examples, decoder: Examples | None, size: int) -> Pairs:
        """Examples for the encoder, and texts for the decoder (None: its start token); or `Tokens` that hold both
        sides.

        One decoder text given as a string goes with each example.
        """
        if set(model.parts) != set(SIDES) or model.part_name != "decoder":
            raise AnalysisError(
                f"{model.name} has the parts {', '.join(model.parts)} and is read as its {model.part_name}; relevance "
                "takes a model of one text, or one of encoder, decoder and cross read as its decoder"
            )
        if not isinstance(examples, str) and len(examples) == 0:
            raise AnalysisError("examples is empty; give at least one text or row of tokens")
        if decoder is not None and isinstance(examples, Tokens) and examples.more:
            raise AnalysisError("these examples hold the decoder's tokens already; leave decoder= out")
        if isinstance(decoder, str) and not isinstance(examples, str):
            decoder = [decoder] * len(examples)
        tokens = model.to_tokens(examples, decoder_input_ids=decoder)
        cross = model.parts["cross"]
        source = axis(cross, cross.keys, tokens)
        if source is None:
            raise AnalysisError(
                f"{model.name}: how many tokens its encoder makes of these examples is not known"
            )
        source = Tokens(source.ids.cpu(), source.mask.cpu())
        of_source = [
            model.to_strings(row) if cross.keys == "encoder" else [f"#{i}" for i in row] for row in source.ids
        ]
        real = tokens.mask.cpu()
        lengths = [(int(a), int(b)) for a, b in zip(source.mask.sum(1), real.sum(1), strict=True)]
        groups: dict[tuple[int, int], list[int]] = {}
        for place, both in enumerate(lengths):
            groups.setdefault(both, []).append(place)
        batches = [
            Batch(
                torch.stack([tokens.ids[place][real[place]] for place in some[i : i + size]]),
                some[i : i + size],
            )
            for _, some in sorted(groups.items())
            for i in range(0, len(some), size)
        ]
        names = [model.to_strings(row) for row in tokens.ids]
        target = Texts(real, names, Axis(tokens.ids.cpu(), real, names), batches)
        return cls(tokens, source, of_source, target)

    def given(self, batch: Batch) -> Tokens:
        """One batch as a call takes it, without padding."""
        more = {name: tensor[batch.places] for name, tensor in self.tokens.more.items()}
        if "input_ids" in more:
            kept = self.source.mask[batch.places]
            ids = more["input_ids"].cpu()
            more["input_ids"] = torch.stack([row[real] for row, real in zip(ids, kept, strict=True)])
            more["attention_mask"] = torch.ones_like(more["input_ids"])
        return Tokens(batch.ids, torch.ones_like(batch.ids, dtype=torch.bool), more)


def relevance_of_pairs(asked: Explained, pairs: Pairs, queries: Positions | None) -> xr.DataArray:
    """Rows of `R_sq` and `R_ss` side by side, [batch, query, key]: the encoder's tokens, then the decoder's.

    None is the row of the position that is asked about.
    """
    texts = pairs.target
    if queries is None:
        for batch in texts.batches:
            place_of(asked.position, batch.ids.shape[1], f"example {batch.places[0]}")
        queries = [asked.position]
    columns = texts.columns(queries)
    own = texts.empty(columns.shape[1])
    source = torch.full((len(own), columns.shape[1], pairs.source.shape[1]), torch.nan, dtype=torch.float64)
    for batch in texts.batches:
        encoder, steps = _slopes(asked, pairs.given(batch), batch)
        rows = indicators(*texts.rows(batch, columns), batch.ids.shape[1])
        mine, across = _rows(encoder, steps, rows)
        texts.spread(batch, mine, own)
        for place, row in zip(batch.places, across.cpu(), strict=True):
            source[place][:, pairs.source.mask[place]] = row
    found = position_coordinates(texts, queries, columns)
    width = pairs.source.shape[1]
    names = np.concatenate([np.array(x, dtype=object) for x in (pairs.source_strings, texts.strings)], 1)
    found["key"] = np.arange(names.shape[1])
    found["key_token"] = (("batch", "key"), names.astype(str))
    found["key_part"] = ("key", np.where(np.arange(names.shape[1]) < width, "encoder", "decoder"))
    values = torch.cat([source, own], -1).numpy()
    return xr.DataArray(values, dims=("batch", "query", "key"), coords=found, name="relevance")


def _rows(encoder: list[WeightSlopes], steps: list[Step], rows: Tensor) -> tuple[Tensor, Tensor]:
    """`rows @ R_ss` and `rows @ R_sq` for rows [batch, asked, token of the decoder]."""
    rows = rows.to(steps[0][1].slope.device)
    to_cross = []  # rows · Π (I + Ā) over the decoder's layers above each cross-attention, the top one first
    for kind, own in reversed(steps):
        if kind == "cross":
            to_cross.append(rows.mT)
        else:
            rows = rows + own.pulled(rows)
    carried = torch.cat([*reversed(to_cross), torch.ones_like(rows[:, :1]).mT], -1)
    gained = torch.zeros_like(carried)  # (R_ss - I) · carried; its last column is the row sums of R_ss - I
    width, across = rows.shape[1], []  # across: rows · R_sq before the encoder, by cross-attention
    for kind, own in steps:
        if kind == "decoder":
            gained = gained + own.pushed(carried + gained)
            continue
        mine = slice(len(across) * width, (len(across) + 1) * width)
        turned = _shared(gained[..., mine], gained[..., -1:]) + carried[..., mine]
        across.append(own.pulled(turned.mT))
    return rows, _through_encoder(encoder, torch.stack(across).sum(0))


def _through_encoder(encoder: list[WeightSlopes], rows: Tensor) -> Tensor:
    """`rows @ (rownorm(R_qq - I) + I)` for rows [batch, asked, token of the encoder]."""
    ones = torch.ones_like(rows[:, :1]).mT
    sums = torch.zeros_like(ones)
    for own in encoder:
        sums = sums + own.pushed(ones + sums)
    shares = _shared(rows, sums.mT)
    gained = torch.zeros_like(rows)
    for own in reversed(encoder):
        gained = gained + own.pulled(shares + gained)
    return gained + rows


def _shared(parts: Tensor, whole: Tensor) -> Tensor:
    """parts / whole; 0 where the whole is 0, NaN where a part is NaN."""
    return torch.where(whole > 0, parts / whole, parts * 0)


class _Kept(Heads):
    """Records the layers of one part as they run; `order` lists the layers of all parts in the order of the run."""

    def __init__(self, view: HookedModel, order: list[tuple[_Kept, int]]) -> None:
        super().__init__(view)
        self.view, self.order = view, order

    def take(self, layer: int, map: AttentionMap, value: Tensor, output: Tensor) -> None:
        super().take(layer, map, value, output)
        self.order.append((self, layer))


def _slopes(asked: Explained, given: Tokens, batch: Batch) -> tuple[list[WeightSlopes], list[Step]]:
    """Slopes of the encoder's layers, and of the decoder's and cross-attention's in the order of the run."""
    model = asked.model
    outputs = outputs_of(model)
    value = asked.of(batch, outputs(given))
    order: list[tuple[_Kept, int]] = []
    views = [_Kept(model.part(name), order) for name in SIDES]
    with contextlib.ExitStack() as stack:
        for kept in views:
            stack.enter_context(context.listening(kept))
            stack.enter_context(context.tapping(kept.view.key, Rooted()))
        found = value(outputs(given, grad=True), torch.arange(len(given)))
    heads = [kept.layers[layer] for kept, layer in order]
    found = differentiable(found, "the measure")
    grads = torch.autograd.grad(found.sum(), [output for *_, output in heads], allow_unused=True)
    encoder, steps = [], []
    for (kept, layer), mine, grad in zip(order, heads, grads, strict=True):
        slopes = slopes_at(kept.view, layer, mine, grad)
        if kept.view.part_name == "encoder":
            encoder.append(slopes)
        else:
            steps.append((kept.view.part_name, slopes))
    return encoder, steps
