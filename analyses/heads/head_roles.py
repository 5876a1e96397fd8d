"""Head roles: scores for previous-token, duplicate-token, induction, first-token, delimiter and positional attention,
for broad and narrow attention, and for copying.

The attention scores come from repeated random tokens, as in Elhage et al. 2021 and Olsson et al. 2022
(transformer-circuits.pub); copying comes from the eigenvalues of the OV circuit. Random tokens have no meaning and no
grammar, so a head may behave differently on real text.
"""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from headwater.analyses._catalogue.analysis import analysis
from headwater.analyses._catalogue.settings import Bounds
from headwater.analyses._prompts.examples import repeated_tokens
from headwater.analyses.heads.circuit_rank import Sides, sides_of_stream
from headwater.kernels.maps.attention_map import AttentionMap
from headwater.kernels.tiles.block import Block
from headwater.lens.errors import AnalysisError, ModelError
from headwater.lens.model import HookedModel
from headwater.lens.models.weights import circuit_ends
from headwater.lens.progress import progress
from headwater.lens.records import sinks as rules
from headwater.lens.records.record import Record

ROLES = (
    "previous", "duplicate", "induction", "prefix_matching", "first", "copying", "positional", "broad", "narrow",
    "delimiter",
)  # fmt: skip
DELIMITERS = ".,;:!?\n"
EVERY = 6  # every sixth token is a delimiter
SHARED = 4  # sequences recorded together
SINK_OF = (
    0.1  # of the heads: a token with more than 0.3 of the attention of more heads than that is set aside
)
ELEMENTS = 2**21  # weights in one block of rows, over all sequences and heads


@analysis
def head_roles(
    model: HookedModel,
    length: Annotated[int | None, "tokens before they repeat; none: 50, or what fits", Bounds(2)] = None,
    sequences: Annotated[int, "random sequences to average over", Bounds(1)] = 8,
    seed: Annotated[int, "seed of the random tokens", Bounds(0)] = 0,
    per_example: Annotated[bool, "keep one value per sequence instead of their mean"] = False,
    sinks: Annotated[Literal["aside"] | None, "take the weights on sinks out; none: leave them in"] = None,
) -> xr.DataArray:
    """Scores [layer, head, role] on [bos] + r + r, where r are m = `length` tokens drawn uniformly from the vocabulary.

    Each is a mean over the queries i of the second copy. `previous`: A[i, i-1]; `duplicate`: A[i, i-m]; `induction`:
    A[i, i-m+1]; `prefix_matching`: Σ A[i, j] over all earlier j whose previous token j-1 equals token i; `first`: the
    weight on the first token. Rows are not renormalised: the weight on a learned sink belongs to no role.

    `copying` = Σ Re λ / Σ |λ| over the eigenvalues λ of W_E·W_V·W_O·W_U, computed from the d_head × d_head matrix
    W_O·W_U·W_E·W_V, which has the same non-zero eigenvalues. The gains of the norm before attention and of the final
    norm are folded in; centring, the scale per token and the first MLP are left out. It is NaN without a language head,
    for weights of unknown layout (the attribute `copying` gives the reason) and for a zero OV circuit.

    Three scores of ours on the same queries. `positional`: `mean_i 2·Σ_j min(A_ij, B_ij) / Σ_j (A_ij + B_ij)` with B
    the map of the next sequence in the batch; 1 if only positions matter (also for even attention), NaN for a single
    sequence. `broad`: the row's entropy divided by the log of the number of visible tokens; `narrow`: the row's largest
    weight; both of rows divided by their sum. `delimiter`, also ours, uses sequences in which every sixth token is a
    delimiter (one of `. , ; : ! ?` or a line end, if it is one token; or the separator token): the mean weight on
    delimiters of queries from the second one on; about 0.17 for even attention, NaN if the tokenizer has no delimiter.

    `sinks="aside"`: a token that is a sink of more than a tenth of all heads (it receives more than 0.3 of their
    attention) has its weights set to 0 in every head, and rows are divided by what is left: roles are then shares of
    the attention to other tokens. All heads that rest on one token look alike: with the sink in, `positional` and
    `narrow` tell little else. The coordinate `aside` [layer, head] is the weight that was taken out; where it is near
    1, the roles tell of the little that is left. `first` is NaN where the first token is set aside.

    Special tokens are not drawn unless there are no others. Without a bos token the sequence is r + r. AnalysisError if
    the model is not causal or the sequence does not fit its context.

    Question: Which simple jobs does each head do?
    Unit: mean attention weight on the role's keys, 0 to 1; copying: from -1 to 1.
    Source: Olsson et al. 2022, arXiv:2209.11895; Elhage et al. 2021 (copying by OV eigenvalues); held to the
    definitions of TransformerLens' detector, prefix matching and copying from memory.
    Cost: two recordings of `sequences` × (2·length + 1) tokens; copying: layers × heads × vocab·d_head².
    Not for: naming what a head does on real text; models that are not causal; heads that act through several
    tokens.

    >>> import headwater as hw
    >>> model = hw.load("tasks-4l")
    >>> found = hw.analyses.head_roles(model, length=8, sequences=2)
    >>> found.sel(role="previous").argmax(("layer", "head"))["layer"].item()
    0
    >>> found.sel(role="induction", layer=1).max().item() > 0.9
    True
    """
    if not model.causal or model.is_encoder_decoder:
        raise AnalysisError(
            f"{model.name} is not causal, or its decoder reads no text of its own; head roles need a model in which "
            "each token sees its past only"
        )
    bos = bos_token(model)
    length = _length(model, length, bos)
    tokens = repeated_tokens(model, length, sequences, seed, bos)
    scores = []
    with torch.no_grad():
        for ids in progress(tokens.split(SHARED), desc="head roles", unit="batch"):
            record, kept = _with_sinks(model, ids, sinks is not None)
            layers = [_pattern_scores(record.map(layer), ids, length, kept) for layer in model.layers]
            scores.append(torch.stack(layers, 1))
        patterns = torch.cat(scores)  # [batch, layer, head, role], and behind them what was set aside
        delimiter = _delimiter_scores(model, tokens, seed, sinks is not None)
    patterns, aside = patterns[..., :-1], patterns[..., -1]
    copying, note = _copying(model)
    copied = copying[None, ..., None].expand(*patterns.shape[:-1], 1)
    result = xr.DataArray(
        torch.cat([patterns[..., :5], copied, patterns[..., 5:], delimiter[..., None]], -1).numpy(),
        dims=("batch", "layer", "head", "role"),
        coords={"layer": model.layers, "head": np.arange(model.n_heads), "role": list(ROLES)},
        name="head_roles",
    )
    if sinks:
        result = result.assign_coords(aside=(("batch", "layer", "head"), aside.numpy()))
    result = result.assign_coords(batch=np.arange(sequences)) if per_example else _mean(result)
    return result.assign_attrs({"length": length, "bos": bos, "copying": note})


def _mean(scores: xr.DataArray) -> xr.DataArray:
    """The mean over sequences of scores, and of what was set aside."""
    mean = scores.mean("batch")
    if "aside" in scores.coords:
        mean = mean.assign_coords(aside=scores.aside.mean("batch"))
    return mean


def bos_token(model: HookedModel) -> int | None:
    """The id of the bos token, if the tokenizer or the configuration names one within the vocabulary."""
    named = getattr(model.tokenizer, "bos_token_id", None)
    if named is None:
        named = getattr(model.hf.config, "bos_token_id", None)
    return named if isinstance(named, int) and 0 <= named < model.vocab else None


def _length(model: HookedModel, length: int | None, bos: int | None) -> int:
    room = (model.context - (bos is not None)) // 2 if model.context else 50
    if length is None:
        length = min(50, room)
    if length < 2 or length > room:
        raise AnalysisError(f"length={length} does not fit; {model.name} holds repeats of 2 to {room} tokens")
    return length


def _with_sinks(model: HookedModel, ids: Tensor, aside: bool) -> tuple[Record, Tensor]:
    """A record of the sequences, and 0 for sinks that are set aside and 1 for other keys, [batch, key]."""
    record = model.record(ids, statistics=("received", "visible") if aside else (), keep=("qk",))
    if not aside:
        return record, torch.ones(ids.shape)
    of_heads = (rules.shares(record) > rules.SHARE).double().mean((1, 2))
    return record, (of_heads <= SINK_OF).float()


def _pattern_scores(map: AttentionMap, ids: Tensor, length: int, kept: Tensor) -> Tensor:
    """The attention scores of one layer on repeated tokens, [batch, head, role], without `delimiter`.

    `kept` [batch, key] is 0 for the sinks that are set aside. Behind the roles stands the weight on these.
    """
    total = ids.shape[1]
    step = max(ELEMENTS // (map.shape[0] * map.shape[1] * total), 1)
    blocks = torch.arange(total - length, total).split(step)
    rows = torch.cat([_of_queries(map, ids, queries, length, kept) for queries in blocks], 2)
    return rows.nanmean(2)


def _of_queries(map: AttentionMap, ids: Tensor, query: Tensor, length: int, kept: Tensor) -> Tensor:
    """The scores of consecutive queries of the second copy, [batch, head, query, role], and the weight set aside."""
    total, rows = ids.shape[1], slice(int(query[0]), int(query[-1]) + 1)
    weights = map.tile(rows, slice(0, total)).double().cpu()  # [batch, head, query, key]
    aside = (weights * (1 - kept)[:, None, None]).sum(-1)
    sunk = ~kept.all(-1)  # texts that have a sink; the others stay as they are
    weights[sunk] *= kept[sunk, None, None]
    weights[sunk] /= weights[sunk].sum(-1, keepdim=True)
    first = weights[..., 0].masked_fill(kept[:, None, None, 0] == 0, torch.nan)
    row = torch.arange(len(query))
    earlier = torch.arange(total) < query[:, None]
    before = torch.nn.functional.pad(ids[:, :-1], (1, 0), value=-1)  # the token at j - 1
    follows = (before[:, None, :] == ids[:, query, None]) & earlier
    prefix = (weights * follows[:, None]).sum(-1)
    own = [weights[:, :, row, key] for key in (query - 1, query - length, query - length + 1)]
    return torch.stack([*own, prefix, first, *_shapes(map, weights, rows, kept), aside], -1)


def _shapes(map: AttentionMap, weights: Tensor, rows: slice, kept: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`positional`, `broad`, `narrow` of weights [batch, head, query, key], each [batch, head, query]."""
    other = weights.roll(-1, 0)
    masses = (weights + other).sum(-1)
    alike = 2 * torch.minimum(weights, other).sum(-1) / masses
    if len(weights) == 1:
        alike = torch.full_like(alike, torch.nan)
    seen = map.rule.mask.visible_keys(*map.shape[:2]).expand(map.shape[:3])[:, :, rows].double()
    seen = seen - _seen_sinks(map, rows, kept == 0)
    shares = weights / weights.sum(-1, keepdim=True)  # a row without weights is NaN
    entropy = -torch.special.xlogy(shares, shares).sum(-1) / seen.log()
    return alike, entropy, shares.amax(-1)


def _seen_sinks(map: AttentionMap, rows: slice, sinks: Tensor) -> Tensor:
    """How many of the sinks [batch, key] each of the rows sees, [batch, head, row]."""
    block = Block(slice(0, map.shape[0]), torch.arange(map.shape[1]), rows, slice(0, map.shape[3]))
    seen = map.rule.mask.tile(block, sinks.device)
    return (sinks[:, None, None] if seen is None else sinks[:, None, None] & seen).sum(-1)


def delimiter_tokens(model: HookedModel) -> list[int]:
    """Ids of the delimiters that are one token, and of the separator token."""
    if model.tokenizer is None:
        return []
    unknown = getattr(model.tokenizer, "unk_token_id", None)
    signs = [model.tokenizer(sign, add_special_tokens=False)["input_ids"] for sign in DELIMITERS]
    found = {getattr(model.tokenizer, "sep_token_id", None), *(ids[0] for ids in signs if len(ids) == 1)}
    return sorted(n for n in found if isinstance(n, int) and n != unknown and 0 <= n < model.vocab)


def _delimiter_scores(model: HookedModel, tokens: Tensor, seed: int, aside: bool) -> Tensor:
    """Mean weight on delimiters, put at every sixth place of the sequences, [batch, layer, head]; with `aside` their
    share of the weight on keys that are no sinks."""
    signs = delimiter_tokens(model)
    missing = torch.full((len(tokens), model.n_layers, model.n_heads), torch.nan, dtype=torch.float64)
    total = tokens.shape[1]
    if not signs or total <= 2 * EVERY:
        return missing
    places = torch.arange(EVERY, total, EVERY)
    picks = torch.randint(
        len(signs), (len(tokens), len(places)), generator=torch.Generator().manual_seed(seed)
    )
    marked = tokens.clone()
    marked[:, places] = torch.tensor(signs)[picks]
    found = []
    for ids in marked.split(SHARED):
        is_sign = torch.isin(ids, torch.tensor(signs)).float()
        record, kept = _with_sinks(model, ids, aside)
        columns = torch.stack([is_sign * kept, kept], -1)
        on_signs = []
        for layer in model.layers:
            on, left = (record.map(layer) @ columns)[:, :, 2 * EVERY :].double().cpu().unbind(-1)
            on_signs.append(torch.where((kept == 0).any(-1)[:, None, None], on / left, on).nanmean(-1))
        found.append(torch.stack(on_signs, 1))
    return torch.cat(found)


def _copying(model: HookedModel) -> tuple[Tensor, str]:
    """Copying scores [layer, head], and their method or the reason why they are NaN."""
    missing = torch.full((model.n_layers, model.n_heads), torch.nan, dtype=torch.float64)
    if not model.has_lm_head:
        return missing, "undefined: the model has no language head"
    try:
        embed, unembed = circuit_ends(model)
        # the vocabulary is summed over once: all heads share W_U·W_E [d_model, d_model]; tokens that are only read, as
        # a start token without logits, can not be copied
        both = min(len(embed), unembed.shape[1])
        ends = unembed[:, :both].double() @ embed[:both].double()
        scores = [copying_scores(sides_of_stream(model, layer), ends) for layer in model.layers]
    except ModelError as error:
        return missing, f"undefined: {error}"
    return torch.stack(scores).cpu(), "OV eigenvalues, layer-norm gains folded in"


def copying_scores(circuits: Sides, ends: Tensor) -> Tensor:
    """Σ Re λ / Σ |λ| per head from W_U·W_E [d_model, d_model]; NaN if every λ is zero."""
    _, _, value, output = circuits
    eigenvalues = torch.linalg.eigvals(output @ ends @ value)  # [head, d_head]
    return eigenvalues.real.sum(-1) / eigenvalues.abs().sum(-1)
