"""The input of a head as a sum over the parts of the residual stream: queries, keys and values by component.

The norm in front of the attention keeps its scale of the run, so it is linear. The biases of the norm and of the
projection form the part "bias". Rotary embeddings are linear too; the model itself applies them to unit vectors, so
that every variant of them is covered.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass

import torch
from torch import Tensor

from headwater.analyses._prompts.examples import Batch
from headwater.analyses._runs.replace_activations import Swap
from headwater.analyses._streams.frozen_norm import Norm
from headwater.analyses._streams.writers import Writers
from headwater.lens.errors import AnalysisError
from headwater.lens.model import HookedModel
from headwater.lens.models import blocks, norms
from headwater.lens.models.closeness import close_or_refuse, of_sums
from headwater.lens.models.signature import first_position
from headwater.lens.naming.heads import Head, named
from headwater.lens.naming.tokens import Tokens
from headwater.lens.progress import progress
from headwater.lens.transformer_lens.run import Function

BIAS = "bias"
AT_ONCE = 2048  # tokens of the copies of a text that one pass takes
NEAR = 1e-4  # relative distance of a vector that was turned from that of the run


def one_head(model: HookedModel, text: str | Head) -> Head:
    """The head of that name. The error lists the heads of the model."""
    return named([text], model.layers, model.n_heads)[0]


@dataclass(frozen=True, eq=False)
class Reading:
    """The components `parts` [batch, position, component, d_model] of the normalised stream that a layer's attention
    reads, and their `names`; "bias" is the last."""

    names: list[str]
    parts: Tensor

    @classmethod
    def of(cls, run: Writers, layer: int) -> Reading:
        part = run.model.parts[run.model.part_name]
        if part.crosses:
            raise AnalysisError(
                f"the keys and values of {part.name} in {run.model.name} are read from the last stream of the "
                f"{part.keys}, not from the {part.queries}'s; take direct_logit_attribution with unit='source', or the "
                "heads of another part"
            )
        norm = blocks.block(run.model, layer).norm1
        named = dict(run.parts(layer))
        stacked = torch.stack(list(named.values()), 2)
        constant = torch.zeros_like(stacked[:, :, :1])
        if norm is not None:
            stacked = Norm.of(norm, run.layers[layer].entering).divided(stacked)
            constant = constant + norms.norm_bias(norm, stacked.shape[-1]).to(stacked)
        return cls([*named, BIAS], torch.cat([stacked, constant], 2))

    def through(self, matrix: Tensor, bias: Tensor) -> Tensor:
        """The parts after a projection [d_model, d], [batch, position, component, d]; its bias [d] goes to "bias"."""
        found = self.parts @ matrix.double()
        found[:, :, -1] += bias.double()
        return found


def rotations(model: HookedModel, batch: Batch, head: Head, places: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The maps [d, d] between a head's projections and its scores, for a query and a key at the positions `places`.

    Each copy of a text gets one unit vector as the output of the projections; the vector that attention receives is a
    row of the map. A norm on queries and keys (Qwen 3) keeps its scale of the run: it divides every unit vector by the
    same number, which the run's own vector tells. A map depends on the position alone, as a rule, so the copies are of
    two tokens that are told to stand there; where these do not give what the run has, they are of the whole text.
    """
    layer, shape = head.layer, model.shape(head.layer)
    heads = {"q": head.head, "k": head.head // (shape.heads // shape.kv)}
    names = {part: f"blocks.{layer}.attn.hook_{part}" for part in heads}
    at = dict(zip("qk", places, strict=True))
    own = Swap(model, 1, keep=list(names.values()), parts=[layer])
    ids = batch.rows([0])
    own.logits(ids, _read(model))
    given = {part: own.cache[name][0, at[part], heads[part]].double() for part, name in names.items()}
    reached = {part: own.seen[layer][part][0, heads[part], at[part]].double() for part in names}

    def found(ids: Tensor, at: dict[str, int]) -> dict[str, Tensor]:
        rows: dict[str, list[Tensor]] = {part: [] for part in names}
        together = max(AT_ONCE // ids.shape[1], 1)
        units = torch.eye(shape.d_head).split(together)
        for some in progress(units, desc="directions of the head", unit="pass"):
            forward = {name: _units(some, at[part], heads[part]) for part, name in names.items()}
            swap = Swap(model, len(some), forward=forward, parts=[layer])
            swap.logits(Batch(ids, [0]).copies(len(some)).ids, _read(model))
            for part in names:
                rows[part].append(swap.seen[layer][part][:, heads[part], at[part]].double())
        turns = {part: torch.cat(each) for part, each in rows.items()}
        return {part: turn * _scale(given[part] @ turn, reached[part]) for part, turn in turns.items()}

    pair = _pair(model, ids, places)
    turns = None if pair is None else found(pair, {"q": 1, "k": 0})
    if turns is None or not all(_same(given[part] @ turn, reached[part]) for part, turn in turns.items()):
        turns = found(ids, at)
    return turns["q"], turns["k"]


def _read(model: HookedModel) -> int | None:
    """One position's logits are enough: what is looked at stands below them."""
    return 0 if model.has_lm_head else None


def _pair(model: HookedModel, ids: Tensor, places: tuple[int, int]) -> Tokens | None:
    """The key and the query of a text as a text of two tokens that stand where they stood; None where a model does not
    take that."""
    known = inspect.signature(model.hf.forward).parameters
    plain = not isinstance(ids, Tokens) and model.causal and not model.is_encoder_decoder
    if not plain or "position_ids" not in known or ids.shape[1] <= 2:
        return None
    here = torch.tensor([[places[1], places[0]]])
    stand = here + first_position(model.hf)
    return Tokens(ids[:, here[0]], torch.ones_like(here, dtype=torch.bool), {"position_ids": stand})


def _same(found: Tensor, reached: Tensor) -> bool:
    return bool((found - reached).norm() <= NEAR * reached.norm())


def _scale(given: Tensor, reached: Tensor) -> Tensor:
    """The factor that takes one vector nearest to the other; 1 where they are equal but for rounding."""
    factor = (given @ reached) / (given @ given).clamp_min(torch.finfo(given.dtype).tiny)
    return torch.where((factor - 1).abs() < 1e-4, torch.ones_like(factor), factor)


def refuse_other_sum(model: HookedModel, found: Tensor, expected: Tensor, what: str) -> None:
    """AnalysisError where the parts do not add up to the model's own value."""
    then = (
        ": something between the stream and it is not linear (a norm on queries and keys), or an edit is on"
    )
    close_or_refuse(
        found, expected, f"{what} does not add up from its parts", then, allowed=of_sums(model), least=1e-2
    )


def _units(units: Tensor, place: int, index: int) -> Function:
    def put(tensor: Tensor, hook: object) -> Tensor:
        tensor[:, place, index] = units.to(tensor)
        return tensor

    return put
