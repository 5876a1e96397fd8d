"""Edits of the scores before the softmax; they act in the given order, before all edits of weights."""

from __future__ import annotations

from dataclasses import dataclass

from headwater.kernels.edits import scores as kernel
from headwater.kernels.tiles import pair_rules
from headwater.lens.attention.context import Lowered
from headwater.lens.edits.base import ANY, HeadWise, LayerCall, Rows, starts
from headwater.lens.naming.heads import Heads, Layers
from headwater.lens.naming.positions import Positions

__all__ = ["BiasKeys", "Emphasise", "GroupedAttention", "Knockout", "StreamingWindow", "Temperature"]


@dataclass(frozen=True, eq=False)
class Temperature(HeadWise, numbers={"tau": ANY}, neutral={"tau": 1}):
    """Scores times `tau` before the softmax: above 1 sharpens, below 1 flattens, 0 makes the row uniform.

    `tau` is the factor itself (an inverse temperature), not a divisor. A learned sink's logit is not touched.

    >>> import headwater as hw
    >>> model = hw.load("tasks-4l")
    >>> with model.edit(hw.Temperature(0.0)):
    ...     model.record("Mary gave John a drink").pattern(1, 3)[0, -1].round(decimals=2)  # 6 keys
    tensor([0.1700, 0.1700, 0.1700, 0.1700, 0.1700, 0.1700])
    """

    tau: float
    heads: Heads = "all"
    layers: Layers = "all"
    rows: Rows = "all"

    def _lower(self, call: LayerCall) -> Lowered:
        return Lowered(scores=(kernel.ScaleScores(call.heads, float(self.tau)),))


@dataclass(frozen=True, eq=False)
class Knockout(HeadWise):
    """`queries` can not attend to `keys`: these scores become -inf, the softmax runs over the other keys.

    A row without any key left gives zero output.

    >>> import headwater as hw
    >>> model = hw.load("tasks-4l")
    >>> with model.edit(hw.Knockout(queries=-1, keys="token:John", heads="1.3")):
    ...     weights = model.record("Mary gave John a drink").pattern(1, 3)[0, -1]
    >>> float(weights[3]), round(float(weights.sum()), 2)  # "John" is token 3
    (0.0, 1.0)
    """

    queries: Positions
    keys: Positions
    heads: Heads = "all"
    layers: Layers = "all"
    rows: Rows = "all"

    def _lower(self, call: LayerCall) -> Lowered:
        block = kernel.BlockScores(call.heads, call.queries(self.queries), call.keys(self.keys))
        return Lowered(scores=(block,))


@dataclass(frozen=True, eq=False)
class BiasKeys(HeadWise, numbers={"bias": ANY}, neutral={"bias": 0}):
    """s → s + bias on `keys`, which multiplies their weight relative to other keys by e^bias; 0 changes nothing.

    >>> import headwater as hw
    >>> model = hw.load("tasks-4l")
    >>> with model.edit(hw.BiasKeys("token:John", -50.0, heads="1.3")):
    ...     model.record("Mary gave John a drink").pattern(1, 3)[0, -1, 3].round(decimals=2)  # 1.00 without the edit
    tensor(0.)
    """

    keys: Positions
    bias: float
    heads: Heads = "all"
    layers: Layers = "all"
    rows: Rows = "all"

    def _lower(self, call: LayerCall) -> Lowered:
        bias = call.keys(self.keys).double() * float(self.bias)
        return Lowered(scores=(kernel.BiasKeys(call.heads, bias),))


@dataclass(frozen=True, eq=False)
class Emphasise(HeadWise, numbers={"amount": ANY}, neutral={"amount": 0}):
    """s → s + amount·|s| on `keys`, in the rows `queries` (PAINT, Arif et al. 2025, its code); 0 changes nothing.

    >>> import headwater as hw
    >>> model = hw.load("tasks-4l")
    >>> with model.edit(hw.Emphasise("token:gave", 50.0, queries=-1, heads="1.3")):
    ...     model.record("Mary gave John a drink").pattern(1, 3)[0, -1].round(decimals=2)
    tensor([0., 0., 1., 0., 0., 0.])
    """

    keys: Positions
    amount: float
    queries: Positions = "all"
    heads: Heads = "all"
    layers: Layers = "all"
    rows: Rows = "all"

    def _lower(self, call: LayerCall) -> Lowered:
        queries, keys = call.queries(self.queries), call.keys(self.keys)
        return Lowered(scores=(kernel.EmphasiseScores(call.heads, queries, keys, float(self.amount)),))


@dataclass(frozen=True, eq=False)
class StreamingWindow(HeadWise, counts={"sinks": 0, "window": 1}, neutral={"window": None}):
    """A query sees the first `sinks` tokens and the `window` latest, its own among them (StreamingLLM, from memory).

    Tokens keep their positions in the text; the published cache renumbers the kept keys. `window=None` hides nothing.

    >>> import headwater as hw
    >>> model = hw.load("tasks-4l")
    >>> with model.edit(hw.Temperature(0.0), hw.StreamingWindow(sinks=1, window=2)):  # uniform over what is visible
    ...     model.record("Mary gave John a drink").pattern(1, 3)[0, -1].round(decimals=2)
    tensor([0.3300, 0.0000, 0.0000, 0.0000, 0.3300, 0.3300])
    """

    sinks: int = 4
    window: int | None = 1020
    heads: Heads = "all"
    layers: Layers = "all"
    rows: Rows = "all"

    def _lower(self, call: LayerCall) -> Lowered:
        assert self.window is not None
        seen = pair_rules.Streaming(starts(call.mask), self.sinks, self.window)
        return Lowered(scores=(kernel.MaskScores(call.heads, seen),))


@dataclass(frozen=True, eq=False)
class GroupedAttention(HeadWise, counts={"size": 1, "shift": 0, "sinks": 0}, neutral={"size": None}):
    """A query sees the tokens of its own group of `size` tokens, and the first `sinks` tokens; these see every token.

    The first group begins at position `-shift`. In S²-Attn (LongLoRA) half of the heads are shifted by half a group;
    SinkLoRA adds the sinks. The model's own mask stays on, so no query sees ahead; the published code rolls the text,
    so that its first tokens see the last ones. `size=None` hides nothing.

    >>> import headwater as hw
    >>> model = hw.load("tasks-4l")
    >>> with model.edit(hw.Temperature(0.0), hw.GroupedAttention(4)):  # uniform over what is visible
    ...     model.record("Mary gave John a drink").pattern(1, 3)[0, -1].round(decimals=2)
    tensor([0.0000, 0.0000, 0.0000, 0.0000, 0.5000, 0.5000])
    """

    size: int | None
    shift: int = 0
    sinks: int = 0
    heads: Heads = "all"
    layers: Layers = "all"
    rows: Rows = "all"

    def _lower(self, call: LayerCall) -> Lowered:
        assert self.size is not None
        seen = pair_rules.Grouped(starts(call.mask), self.size, self.shift, self.sinks)
        return Lowered(scores=(kernel.MaskScores(call.heads, seen),))
