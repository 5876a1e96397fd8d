"""Position swap: where the sink goes if two learned position embeddings are exchanged.

Gu et al., ICLR 2025 (arXiv 2410.10781): in GPT2-XL the sink follows the embedding of the first position. Two recordings
of column statistics, for models with one table of learned absolute positions.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Annotated, Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn

from headwater.analyses._catalogue.analysis import analysis
from headwater.analyses._catalogue.settings import BatchSize, Bounds, Draws, Seed
from headwater.analyses._measures.bootstrap import intervals
from headwater.analyses._prompts.examples import Examples
from headwater.analyses._prompts.texts import Texts
from headwater.analyses.sinks._received_share import received_share
from headwater.lens.attention.module_hooks import on
from headwater.lens.errors import AnalysisError
from headwater.lens.model import HookedModel
from headwater.lens.models import blocks
from headwater.lens.progress import progress

VERSIONS = ("plain", "swapped")


@analysis
def position_swap(
    model: HookedModel,
    examples: Examples,
    first: Annotated[int, "one of the two positions, from 0", Bounds(0)] = 0,
    second: Annotated[int | None, "the other; none: 4, or the last of the shortest text", Bounds(0)] = None,
    threshold: Annotated[float, "share above which a token is a sink", Bounds(0.0, 1.0)] = 0.3,
    draws: Draws = 1000,
    seed: Seed = 0,
    batch_size: BatchSize = 16,
) -> xr.Dataset:
    """Shares and sink rates at two positions, plain and with their position embeddings p swapped.

    With the swap the token at `first` gets `p[second]` and the token at `second` gets `p[first]`; tokens and causal
    order do not change. `share` [version, batch, layer, head, key] is α of the two keys (see `sink_rate`). `rate`
    [version, batch, key] is the fraction of (layer, head) with α > `threshold`; `mean`, `low`, `high` [version, key]
    are its mean over texts and the 95 % bootstrap bounds. `top` [version, batch] is the position with the largest mean
    share over layers and heads, without the last position, which only its own query sees. If the sink belongs to the
    position, it moves to `second`. If it belongs to the token, or to the key that all queries see, it stays at `first`.
    AnalysisError for other kinds of positions, or if the two are not different positions of every text.

    Question: Does the sink follow the first position's embedding when it is swapped with another's?
    Unit: share: mean weight per query that sees the key; rate: fraction of (layer, head).
    Source: Gu et al., ICLR 2025, arXiv:2410.10781 (positions 1 and 5, counted from 1); metric held to the authors'
    code, intervals are ours.
    Cost: two recordings of each text with two statistics, memory O(S).
    Not for: models with rotary, relative or no positions (refused); sinks that the first token's content makes.

    >>> import headwater as hw
    >>> import torch, transformers
    >>> config = transformers.GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=16)
    >>> model = hw.load(transformers.GPT2LMHeadModel(config))
    >>> found = hw.analyses.position_swap(model, torch.arange(8)[None], draws=10)
    >>> found.share.shape, found.key.values.tolist()
    ((2, 1, 2, 2, 2), [0, 4])
    """
    table = _table(model)
    texts = Texts.of(model, examples, batch_size)
    shortest = int(texts.keys.valid.sum(1).min())
    second = min(4, shortest - 1) if second is None else second
    if first == second or max(first, second) >= shortest:
        raise AnalysisError(
            f"first={first} and second={second} are not two positions of every text; the shortest has {shortest} tokens"
        )
    shape = (2, len(texts.valid), model.n_layers, model.n_heads, 2)
    shares, top = np.full(shape, np.nan), np.zeros(shape[:2], dtype=int)
    for batch in progress(texts.batches, desc="position swap", unit="batch"):
        for version in range(2):
            with _swapped(table, first, second) if version else contextlib.nullcontext():
                record = model.record(batch.ids, statistics=("received", "visible"), keep=())
            share = received_share(record)
            shares[version, batch.places] = share.isel(key=[first, second]).values
            seen = share.isel(key=slice(0, max(share.sizes["key"] - 1, 1))).mean(("layer", "head"))
            top[version, batch.places] = seen.fillna(-1).argmax("key").values
    coords = {"version": list(VERSIONS), "layer": model.layers, "head": np.arange(model.n_heads)}
    dims = ("version", "batch", "layer", "head", "key")
    result = xr.Dataset({"share": (dims, shares), "top": (dims[:2], top)}, {**coords, "key": [first, second]})
    rate = (result.share > threshold).where(result.share.notnull()).mean(("layer", "head"))
    by_text = rate.transpose("batch", "version", "key").values
    result = result.assign({"rate": rate, **intervals(by_text, ("version", "key"), draws, seed)})
    return result.assign_attrs(second=second)


def _table(model: HookedModel) -> nn.Module:
    """The table of learned absolute positions of the tokens that the model's part looks at; AnalysisError names the
    kind of positions otherwise."""
    tables = blocks.position_tables(model.hf)
    part = model.parts[model.part_name]
    if part.crosses:
        part = next((p for p in model.parts.values() if p.queries == p.keys == part.keys), part)
    paths = {module: path.split(".") for path, module in model.hf.named_modules()}
    others = [m for p in model.parts.values() if p.queries != part.queries for m in p.modules]
    stack = paths[next(iter(part.modules))]

    def shared(table: nn.Module, module: list[str]) -> int:
        alike = [one == other for one, other in zip(paths[table], module, strict=False)]
        return [*alike, False].index(False)

    own = [t for t in tables if all(shared(t, stack) > shared(t, paths[m]) for m in others)]
    if len(own) == 1:
        return own[0]
    rotary = any("rotary" in path for path, _ in model.hf.named_modules())
    kind = "rotary positions" if rotary else "no single table of learned absolute positions"
    raise AnalysisError(
        f"{model.name} has {kind}; positions are swapped in models such as GPT-2, OPT or BERT"
    )


@contextlib.contextmanager
def _swapped(table: nn.Module, first: int, second: int) -> Iterator[None]:
    """Swap the outputs of the table at two positions of texts without padding, in this context alone."""

    called = []

    def swap(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        called.append(module)
        order = torch.arange(output.shape[-2], device=output.device)
        order[[first, second]] = order[[second, first]]
        return output.index_select(-2, order)

    with on(table, after=swap):
        yield
    if not called:
        raise AnalysisError(
            f"the model reads the positions off the weight of its {type(table).__name__}, where they can not be swapped"
        )
