"""Head roles: does a head look at the previous token, at duplicates, at what followed them, and does it copy.

Scores on repeated random tokens, as in Elhage et al. 2021 and Olsson et al. 2022 (transformer-circuits.pub),
and the eigenvalues of the OV circuit. Random tokens leave out meaning and grammar on purpose; what a head
does on real text may be something else.
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
import torch
import xarray as xr
from torch import Tensor
from tqdm import tqdm

from headwater.analyses._about import About
from headwater.analyses._settings import Bounds
from headwater.kernels.operator import AttentionMap
from headwater.lens.errors import AnalysisError, ModelError
from headwater.lens.model import HookedModel
from headwater.lens.record import provenance
from headwater.lens.weights import LayerWeights, circuit_ends, layer_weights

ABOUT = About(
    question="Which simple jobs does each head do?",
    unit="mean attention weight on the role's keys, 0 to 1; copying: from -1 to 1",
    paper="Olsson et al. 2022, arXiv:2209.11895; Elhage et al. 2021 (copying by OV eigenvalues)",
    inputs="model",
    cost="one recording of `sequences` × (2·length + 1) tokens; copying: layers × heads × vocab·d_head²",
    not_for="naming what a head does on real text; models that are not causal; heads that act through several tokens",
)

ROLES = ("previous", "duplicate", "induction", "prefix_matching", "first", "copying")
SHARED = 4  # sequences recorded together


def head_roles(
    model: HookedModel,
    length: Annotated[
        int | None, "tokens before they repeat; none: 50, or what the context holds", Bounds(2)
    ] = None,
    sequences: Annotated[int, "random sequences to average over", Bounds(1)] = 8,
    seed: Annotated[int, "seed of the random tokens", Bounds(0)] = 0,
    per_example: Annotated[bool, "keep one value per sequence instead of their mean"] = False,
) -> xr.DataArray:
    """Scores [layer, head, role] on [bos] + r + r, with r `length` (m) tokens drawn uniformly from the
    vocabulary.

    Each is a mean over the queries i of the second copy: `previous` A[i, i-1]; `duplicate` A[i, i-m];
    `induction` A[i, i-m+1]; `prefix_matching` Σ A[i, j] over all earlier j with token j-1 equal to token i;
    `first` the weight on the first token. Weights count as they are: what a learned sink or a window takes is
    no part of any role.

    `copying` = Σ λ / Σ |λ| over the eigenvalues λ of W_E·W_V·W_O·W_U (real parts in the numerator), computed
    in the d_head × d_head matrix W_O·W_U·W_E·W_V, which has the same non-zero ones. The gains of the layer
    norm before attention and of the last norm are folded in; centring, per-token scale and the first MLP are
    left out. It is NaN where it is not defined: no language head, an architecture whose weights
    `lens.weights` cannot name (the reason stands in the attribute `copying`), or an OV circuit that is zero.

    Special tokens are not drawn, unless nothing else is there. Without a bos token the sequence is r + r.
    Unit: weight, copying none. Source: the library detector's definitions, checked; prefix matching and
    copying from memory.
    """
    if not model.causal:
        raise AnalysisError(
            f"{model.name} is not causal; head roles need a model in which each token sees its past only"
        )
    bos = bos_token(model)
    length = _length(model, length, bos)
    if sequences < 1:
        raise AnalysisError(f"sequences={sequences} is too few; give 1 or more")
    tokens = repeated_tokens(model, length, sequences, seed, bos)
    scores = []
    with torch.no_grad():
        for ids in tqdm(tokens.split(SHARED), desc="head roles", unit="batch", disable=None):
            record = model.record(ids, statistics=(), keep=("qk",))
            layers = [_pattern_scores(record.map(layer), ids, length) for layer in model.layers]
            scores.append(torch.stack(layers, 1))
    patterns = torch.cat(scores)  # [batch, layer, head, role]
    copying, note = _copying(model)
    copied = copying[None, ..., None].expand(*patterns.shape[:-1], 1)
    result = xr.DataArray(
        torch.cat([patterns, copied], -1).numpy(),
        dims=("batch", "layer", "head", "role"),
        coords={"layer": model.layers, "head": np.arange(model.n_heads), "role": list(ROLES)},
        name="head_roles",
    )
    result = result.assign_coords(batch=np.arange(sequences)) if per_example else result.mean("batch")
    settings = {"length": length, "sequences": sequences, "seed": seed, "bos": bos, "copying": note}
    return result.assign_attrs(ABOUT.attrs(provenance(model), **settings))


def bos_token(model: HookedModel) -> int | None:
    """The id that begins a sequence, if the tokenizer or the configuration names one inside the
    vocabulary."""
    named = getattr(model.tokenizer, "bos_token_id", None)
    if named is None:
        named = getattr(model.hf.config, "bos_token_id", None)
    return named if isinstance(named, int) and 0 <= named < model.vocab else None


def repeated_tokens(model: HookedModel, length: int, sequences: int, seed: int, bos: int | None) -> Tensor:
    """[bos] + r + r as token ids [batch, position]; the same for the same seed on every machine."""
    special = set(getattr(model.tokenizer, "all_special_ids", None) or []) | {bos}
    drawable = torch.tensor(
        [token for token in range(model.vocab) if token not in special] or list(range(model.vocab))
    )
    picks = torch.randint(len(drawable), (sequences, length), generator=torch.Generator().manual_seed(seed))
    copy = drawable[picks]
    start = [] if bos is None else [torch.full((sequences, 1), bos)]
    return torch.cat([*start, copy, copy], 1)


def _length(model: HookedModel, length: int | None, bos: int | None) -> int:
    room = (model.context - (bos is not None)) // 2 if model.context else 50
    if length is None:
        length = min(50, room)
    if length < 2 or length > room:
        raise AnalysisError(f"length={length} does not fit; {model.name} holds repeats of 2 to {room} tokens")
    return length


def _pattern_scores(map: AttentionMap, ids: Tensor, length: int) -> Tensor:
    """The five attention scores of one layer, [batch, head, role]."""
    total = ids.shape[1]
    start = total - length
    weights = map.tile(slice(start, total), slice(0, total)).double().cpu()  # [batch, head, query, key]
    query = torch.arange(start, total)
    row = torch.arange(length)

    def at(key: Tensor) -> Tensor:
        return weights[:, :, row, key].mean(-1)

    earlier = torch.arange(total) < query[:, None]
    before = torch.nn.functional.pad(ids[:, :-1], (1, 0), value=-1)  # the token at j - 1
    follows = (before[:, None, :] == ids[:, query, None]) & earlier
    prefix = (weights * follows[:, None]).sum(-1).mean(-1)
    first = weights[..., 0].mean(-1)
    return torch.stack([at(query - 1), at(query - length), at(query - length + 1), prefix, first], -1)


def _copying(model: HookedModel) -> tuple[Tensor, str]:
    """Copying scores [layer, head], and how they were made or why they are missing."""
    missing = torch.full((model.n_layers, model.n_heads), torch.nan, dtype=torch.float64)
    if not model.has_lm_head:
        return missing, "undefined: the model has no language head"
    try:
        embed, unembed = circuit_ends(model)
        # the vocabulary is summed over once: all heads share W_U·W_E [d_model, d_model]
        ends = unembed.double() @ embed.double()
        scores = [copying_scores(layer_weights(model, layer), ends) for layer in model.layers]
    except ModelError as error:
        return missing, f"undefined: {error}"
    return torch.stack(scores).cpu(), "OV eigenvalues, layer-norm gains folded in"


def copying_scores(weights: LayerWeights, ends: Tensor) -> Tensor:
    """Σ λ / Σ |λ| per head from W_U·W_E [d_model, d_model]; NaN where every λ is zero."""
    value = weights.gain.double()[:, None] * weights.value.double()
    eigenvalues = torch.linalg.eigvals(weights.output.double() @ ends @ value)  # [head, d_head]
    return eigenvalues.real.sum(-1) / eigenvalues.abs().sum(-1)
