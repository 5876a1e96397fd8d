"""Recipes that need no images: calibrated sinks, blocked groups, small caches, forced heads, softmax-off-by-one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from headwater.lens.edits.base import Edit
from headwater.lens.edits.eviction import HeavyHitters
from headwater.lens.edits.order_free import PositionInvariant
from headwater.lens.edits.pair_masks import MaskPairs
from headwater.lens.edits.patterns import InjectPattern
from headwater.lens.edits.scores import GroupedAttention, Knockout, StreamingWindow
from headwater.lens.edits.weights import Normaliser, Redistribute, TowardIdentity
from headwater.lens.errors import EditError
from headwater.lens.model import HookedModel
from headwater.lens.naming.heads import Head, Heads, Layers, chosen
from headwater.lens.naming.positions import Positions
from headwater.lens.naming.tokens import Tokens
from headwater.lens.records import sinks

Measure = Callable[[Float[Tensor, "batch position vocab"], Tokens], Float[Tensor, " batch"]]


def attention_calibration(
    model: HookedModel, heads: Heads = "all", *, keep: float = 0.4, alpha: float = 5.0, layers: Layers | None = None
) -> list[Edit]:  # fmt: skip
    """ACT (Yu et al., ICML 2024, arXiv:2406.15765): scale down the sinks of a head, except the first sink.

    Sinks are the tokens j with α_j = Σ_i A_ij / (N - j) > alpha / N, without the first of them. There A_ij ← keep·A_ij,
    and the freed weight goes to the other tokens of the row in proportion to their weights. Sinks are found on the
    prompt before the run; the edit acts on generated rows too (the authors' code calibrates only the prompt). `layers`
    is 2 to the last but one by default. Checked against the authors' code, the threshold against the text.
    `calibration_heads` is the paper's head filter.

    >>> import headwater as hw
    >>> model = hw.load("tasks-4l")
    >>> hw.recipes.attention_calibration(model, heads="2.0")[0].to_python()
    "hw.Redistribute(keys='sinks:act:5', heads='2.0', layers=[2])"
    """
    if layers is None:
        layers = model.layers[2:-1]
        if not layers:
            raise EditError(
                f"attention_calibration leaves the first two layers and the last alone, and {model.name} has "
                f"{model.n_layers}; give layers="
            )
    return [Redistribute(keys=f"sinks:act:{alpha:g}", keep=keep, heads=heads, layers=layers)]


def calibration_heads(
    model: HookedModel, examples: Any, measure: Measure | None = None, *, heads: Heads = "all", keep: float = 0.4,
    alpha: float = 5.0, layers: Layers | None = None,
) -> list[Head]:  # fmt: skip
    """ACT's head filter: the heads whose calibration, one head at a time, does not lower the mean of `measure`.

    `measure(logits, tokens)` returns [batch], higher is better; the default is minus the next-token loss. A head
    without sinks stays, as its calibration changes nothing. Cost: one recording of the examples, and one pass of them
    per head that has sinks. The paper measures accuracy on 900 samples of nine data sets.

    >>> import headwater as hw
    >>> model = hw.load("tasks-4l")
    >>> text = "When Mary and John went to the store , John gave a drink to Mary"
    >>> kept = hw.recipes.calibration_heads(model, text, heads=["2.0", "2.6"], layers=2)
    >>> set(kept) <= {hw.Head(2, 0), hw.Head(2, 6)}
    True
    """
    tokens = model.to_tokens(examples)

    def score() -> float:
        found = -model.loss(tokens) if measure is None else measure(model(tokens), tokens)
        return float(found.double().mean())

    layers = model.layers[2:-1] if layers is None else layers
    masks = chosen(heads, layers, model.layers, model.n_heads)
    rule = f"sinks:act:{alpha:g}"
    statistics, kept_parts = sinks.needs([rule])
    record = model.record(tokens, statistics=statistics, keep=kept_parts)
    found, start = sinks.find(record, rule), record.valid.long().argmax(1)
    plain, kept = score(), []
    for layer, mask in masks.items():
        for head in mask.nonzero()[:, 0].tolist():
            at = Head(layer, head)
            rows: dict[tuple[int, ...], list[int]] = {}
            for row, column in found[:, record.layers.index(layer), head].nonzero().tolist():
                rows.setdefault((row,), []).append(column - int(start[row]))
            with model.edit(*(Redistribute(keys, keep, heads=at, rows=row) for row, keys in rows.items())):
                if not rows or score() >= plain:
                    kept.append(at)
    return kept


def soft_perturbation(heads: Heads, amount: float = 1.0, *, layers: Layers = "all") -> list[Edit]:
    """SoftPAG (Ahn et al. 2025): A' = (1-u)·A + u·I in the chosen heads; u = 1 is PAG. Checked against the text.

    `guided` then combines the logits of the plain and of the perturbed run.

    >>> import headwater as hw
    >>> hw.recipes.soft_perturbation("2.0", 0.5)[0].to_python()
    "hw.TowardIdentity(amount=0.5, heads='2.0')"
    """
    return [TowardIdentity(amount, heads=heads, layers=layers)]


def block_groups(
    source: Positions = "image", target: Positions = "generated", *,
    layers: Layers = "all", heads: Heads = "all",
) -> list[Edit]:  # fmt: skip
    """Knockout between token groups (Kaduri, Bagon & Dekel, CVPR 2025): `target` may not read `source`.

    S_ij = -inf for i in target and j in source, in the layers given, before the softmax. Variants of the paper: image →
    generated, image → text, text → generated, in all layers or a window. Formula from the abstract and a summary.

    >>> import headwater as hw
    >>> hw.recipes.block_groups("image", "text", layers=[2, 3])[0].to_python()
    "hw.Knockout(queries='text', keys='image', layers=[2, 3])"
    """
    return [Knockout(queries=target, keys=source, heads=heads, layers=layers)]


def order_free(model: HookedModel, documents: Any) -> list[Edit]:
    """PINE (Wang et al. 2024): read documents, pairs [first, end) of positions, as if they had no order.

    Documents attend to each other in both directions. Every query reads the documents sorted by its attention to them
    without positions, the most important nearest. Permuting the documents changes later tokens only by rounding.
    Checked against the authors' code. Only for models with rotary positions and no window; EditError for others.

    >>> import headwater as hw
    >>> model = hw.load("tasks-4l")
    >>> hw.recipes.order_free(model, [(1, 3), (3, 5)])[0].to_python()
    'hw.PositionInvariant(documents=[[1, 3], [3, 5]])'
    """
    edit = PositionInvariant(documents)
    edit.prepare(model)
    return [edit]


def streaming(sinks: int = 4, window: int = 1020) -> list[Edit]:
    """StreamingLLM (Xiao et al., ICLR 2024, memory): a query sees the first `sinks` tokens and the `window` last.

    Tokens keep their positions in the text; the published cache renumbers the kept keys.

    >>> import headwater as hw
    >>> hw.recipes.streaming(sinks=1, window=64)[0].to_python()
    'hw.StreamingWindow(sinks=1, window=64)'
    """
    return [StreamingWindow(sinks, window)]


def heavy_hitters(heavy: int, recent: int) -> list[Edit]:
    """H2O (Zhang et al. 2023, from memory): a cache of the `recent` latest keys and the `heavy` most attended others.

    Per head, acc_j = Σ_i A_ij over the queries so far, among the keys still kept. The key with the lowest acc is
    evicted and never returns.

    >>> import headwater as hw
    >>> hw.recipes.heavy_hitters(heavy=8, recent=16)[0].to_python()
    'hw.HeavyHitters(heavy=8, recent=16)'
    """
    return [HeavyHitters(heavy, recent)]


def shifted_groups(model: HookedModel, size: int) -> list[Edit]:
    """S²-Attn (LongLoRA): attention in groups of `size` tokens, in half of the heads shifted by half a group.

    Checked against the code, with one difference: in the code the first tokens see the last tokens of the text, here no
    query sees ahead. The paper sets `size` to a quarter of the text, and uses the groups only in training.

    >>> import headwater as hw
    >>> model = hw.load("tasks-4l")
    >>> [(edit.size, edit.shift, len(edit.heads)) for edit in hw.recipes.shifted_groups(model, size=4)]
    [(4, 0, 16), (4, 2, 16)]
    """
    first, second = _split(model, model.n_heads // 2)
    return [GroupedAttention(size, heads=first), GroupedAttention(size, shift=size // 2, heads=second)]


def sink_fixed_groups(model: HookedModel, size: int, *, sinks: int = 4) -> list[Edit]:
    """SF-Attn (SinkLoRA, checked against notes of it): groups as in S²-Attn, shifted in the last quarter of the heads.

    The first `sinks` tokens see every token and are seen by every token, within the model's own mask.

    >>> import headwater as hw
    >>> model = hw.load("tasks-4l")
    >>> edits = hw.recipes.sink_fixed_groups(model, size=4)
    >>> [(edit.shift, edit.sinks, len(edit.heads)) for edit in edits]
    [(0, 4, 24), (2, 4, 8)]
    """
    first, second = _split(model, model.n_heads - model.n_heads // 4)
    plain = GroupedAttention(size, sinks=sinks, heads=first)
    return [plain, GroupedAttention(size, shift=size // 2, sinks=sinks, heads=second)]


def force_attention(
    heads: Heads, keys: Positions, *, queries: Positions = -1, amount: float = 1.0
) -> list[Edit]:
    """Attention forcing (Merullo, Eickhoff & Pavlick, ICLR 2024): these heads attend to `keys`, evenly, at `queries`.

    In the paper GPT-2 Medium rose from 49.6 to 93.7 % on coloured objects when inhibition and negative-mover heads were
    forced to attend to the wrong colours. Checked against the text, not the code; the even weights are our reading.

    >>> import headwater as hw
    >>> hw.recipes.force_attention("2.0", "token:Mary")[0].to_python()
    "hw.InjectPattern(pattern={'keys': 'token:Mary'}, heads='2.0', queries=-1)"
    """
    return [InjectPattern({"keys": keys}, amount, heads=heads, queries=queries)]


def off_by_one(*, layers: Layers = "all") -> list[Edit]:
    """Softmax-off-by-one: A_ij = exp(s_ij) / (1 + Σ_j exp(s_ij)), a sink logit of 0 (as in Gu et al., ICLR 2025).

    >>> import headwater as hw
    >>> hw.recipes.off_by_one()[0].to_python()
    "hw.Normaliser(name='softmax1')"
    """
    return [Normaliser("softmax1", layers=layers)]


def _split(model: HookedModel, count: int) -> tuple[list[Head], list[Head]]:
    """The first `count` heads of every layer, and the others."""
    every = [Head(layer, head) for layer in model.layers for head in range(model.n_heads)]
    return [h for h in every if h.head < count], [h for h in every if h.head >= count]


def own_category(marks: Bool[Tensor, "batch key"]) -> list[Edit]:
    """The masks of Pruthi et al. 2020 (arXiv 1909.07913): a token sees its own category alone, marked or not.

    `marks` are those of `hw.losses.marked`. The first token, the class token, sees all, and no other token sees it; so
    marked words reach it by its own attention only. One edit for each text. Checked against the paper's description of
    its code for BERT.

    >>> import headwater as hw
    >>> model = hw.load("deceptive-2l")
    >>> record = model.record("mr davis came to york .")
    >>> with model.edit(*hw.recipes.own_category(hw.losses.marked(record, "mr"))):
    ...     int((model.record("mr davis came to york .").pattern(0)[0, 0, 2] > 0).sum())  # what "davis" sees
    6
    """
    edits: list[Edit] = []
    for row, mark in enumerate(torch.as_tensor(marks, dtype=torch.bool)):
        seen = mark[:, None] == mark
        seen[:, 0] = False
        seen[0] = True
        edits.append(MaskPairs(seen, rows="all" if len(marks) == 1 else [row]))
    return edits
