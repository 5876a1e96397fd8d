"""Token importance: how much each patch matters to what is read of a picture, by the flow of information.

FlowCut (Tong et al. 2025): the class token's attention, the strength of values and their likeness to its own, carried
on over the layers. lens/edits/token_scores.py has the formulas; `PruneTokens` removes tokens by the same scores.
"""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from headwater.analyses._catalogue.analysis import analysis
from headwater.analyses._catalogue.settings import Seed
from headwater.analyses._prompts.positions import patch_coordinates
from headwater.lens.edits import token_scores
from headwater.lens.errors import AnalysisError
from headwater.lens.records.record import Record

Method = Literal["flow", "attention", "values", "random"]


@analysis(keep=("qkv",), maps="square")
def token_importance(
    record: Record,
    method: Annotated[Method, "which score: FlowCut's flow, attention alone, values alone, random"] = "flow",
    seed: Seed = 0,
) -> xr.DataArray:
    """`s_j = (a_j/Σa + r_j/Σr)·‖v_j‖₁` of every token j, carried on as `½·before + ½·s`: [batch, layer, key].

    a is the reader's attention, r the softmax over all tokens of the unscaled products of its value with theirs, both
    in the mean over heads, v_j the values in the mean over heads. The reader is the class token of an image tower and
    the last token of a language model; without either a is the attention received, in the mean over the queries that
    see j, and s_j = a_j·‖v_j‖₁, as FlowCut's code has it for Qwen2-VL. `method` "attention" is a alone, "values" ‖v_j‖₁
    alone, neither carried on, "random" a control. Where the tokens hold a picture, its patches have a score and all
    others are NaN; else all tokens but the reader have one. Attribute `reader` says who reads. Layers that were not
    recorded are left out of what is carried on.

    Question: Which patches matter to what is read of a picture?
    Unit: none: only the order of the tokens of one layer counts.
    Source: FlowCut, Tong et al. 2025; formula from its code (TungChintao/FlowCut), held to it by a test.
    Cost: one row of each map, and one product per value; memory O(S).
    Not for: what a model needs: a token may be read by many and carry nothing; see pruning_curve.

    >>> import headwater as hw, torch, transformers
    >>> sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    >>> config = transformers.ViTConfig(image_size=32, patch_size=8, **sizes)
    >>> model = hw.load(transformers.ViTModel(config).eval())
    >>> found = hw.analyses.token_importance(model.record(torch.rand(1, 3, 32, 32), keep="qkv"))
    >>> found.dims, found.shape, found.reader, int(found.isnull().sum())  # the class token has no score
    (('batch', 'layer', 'key'), (1, 2, 17), 'class', 2)
    """
    if missing := [layer for layer in record.layers if layer not in record.values]:
        raise AnalysisError(f"layer {missing[0]} has no values in this record; record with keep='qkv'")
    batch, count = record.valid.shape
    pictured = any(len(pictures) for pictures in record.grids)
    patches = torch.zeros(batch, count, dtype=torch.bool)
    for row, pictures in enumerate(record.grids):
        for grid in pictures:
            patches[row, grid.tokens()] = True
    classed = pictured and all(row[0] == "[CLS]" for row in record.strings)
    reader = "last" if record.causal else "class" if classed else "all"
    rows = token_scores.reading_rows(reader, record.valid, batch, count)
    among = (patches if pictured else record.valid) & record.valid
    if rows is not None:
        among = among.scatter(1, rows[:, None], False)
    if not among.any():
        raise AnalysisError("there is no token beside the one that reads; give a picture or a longer text")
    drawn = torch.rand(batch, count, generator=torch.Generator().manual_seed(seed))
    found: list[Tensor] = []
    for layer in record.layers:
        if method == "random":
            found.append(drawn)
            continue
        value = record.values[layer]
        strong = token_scores.strength(value)
        attending = token_scores.attention(record.map(layer), rows) if method != "values" else strong
        if method == "flow":
            related = (
                None if rows is None else token_scores.relation(value, rows, _seen(record, rows, reader))
            )
            attending = token_scores.flow(attending, related, strong, among, found[-1] if found else None)
        found.append(attending)
    scores = torch.stack(found, 1).masked_fill(~among[:, None], torch.nan)
    columns = torch.arange(count).expand(batch, -1)
    names = np.array(record.strings, dtype=object).astype(str)
    return xr.DataArray(
        scores.numpy(),
        dims=("batch", "layer", "key"),
        coords={
            **patch_coordinates(record, "key", columns),
            "batch": np.arange(batch),
            "layer": record.layers,
            "key": np.arange(count),
            "key_token": (("batch", "key"), names),
        },
        name="token_importance",
        attrs={"reader": reader},
    )


def _seen(record: Record, rows: Tensor, reader: str) -> Tensor:
    """The keys that the reader sees, bool [batch, key]."""
    seen = record.valid
    return seen if reader == "class" else seen & (torch.arange(seen.shape[1]) <= rows[:, None])
