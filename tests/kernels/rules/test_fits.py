"""What does not fit together is refused in one line with names and numbers, by every backend, before anything runs.

Seen to fail without the check: a mask of 5 queries for 6 gave a zero row or wrong numbers, keys beyond the mask were
left out, heads on the last axis gave finite nonsense.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

import jaxtyping
import pytest
import torch

from headwater.kernels.attend import attend
from headwater.kernels.backends.choose import NAMES
from headwater.kernels.edits import scores, weights
from headwater.kernels.edits.patterns import Fixed, Matching, OnKeys
from headwater.kernels.edits.scores import BiasKeys, BlockScores
from headwater.kernels.edits.weights import MixIdentity, MixPattern, Rescale, RowCondition
from headwater.kernels.rules.fits import SHAPES
from headwater.kernels.rules.rule import ScoreRule
from headwater.kernels.tiles.mask import Mask

Q, K = (2, 4, 6, 8), (2, 2, 5, 8)


def bools(*shape: int) -> torch.Tensor:
    return torch.ones(shape, dtype=torch.bool)


def rescale(keys: int = 5, **more: object) -> Rescale:
    return Rescale(bools(4), bools(1, keys), ~bools(1, keys), 0.5, **more)  # type: ignore[arg-type]


CASES = {
    "more keys than the mask": ({"k": (2, 2, 7, 8)}, r"k must be .* = \[2, 2, 5, 8\]; got \[2, 2, 7, 8\]"),
    "fewer queries than the mask": (
        {"q": (2, 4, 5, 8)},
        r"q must be .* = \[2, 4, 6, 8\]; got \[2, 4, 5, 8\]",
    ),
    "another batch": ({"k": (1, 2, 5, 8)}, r"k must be .* = \[2, 2, 5, 8\]; got \[1, 2, 5, 8\]"),
    "heads on another axis": ({"q": (2, 6, 4, 8)}, r"q must be .*; got \[2, 6, 4, 8\]"),
    "three axes": ({"q": (4, 6, 8)}, r"q must be \[batch, head, query, d_head\]; got \[4, 6, 8\]"),
    "heads that do not divide": ({"k": (2, 3, 5, 8), "v": (2, 3, 5, 8)}, "q has 4 heads and k 3"),
    "fewer heads of values": ({"v": (2, 1, 5, 8)}, r"v must be .* = \[2, 2, 5, any\]; got \[2, 1, 5, 8\]"),
    "fewer values": ({"v": (2, 2, 4, 8)}, r"v must be .*; got \[2, 2, 4, 8\]"),
    "another width": ({"k": (2, 2, 5, 6)}, r"k must be .*; got \[2, 2, 5, 6\]"),
    "sinks of three heads": ({"sinks": (3,)}, r"sinks must be \[head\] = \[4\] or .*; got \[3\]"),
    "one sink": ({"sinks": (1,)}, r"sinks must be .*; got \[1\]"),
    "slopes of two heads": ({"alibi": (2,)}, r"alibi must be \[head\] = \[4\]; got \[2\]"),
    "a bias of other keys": ({"bias": (1, 1, 6, 6)}, r"bias must be .*; got \[1, 1, 6, 6\]"),
}
EDITS = {
    "heads": (MixIdentity(bools(3), 0.5), r"MixIdentity.heads must be \[head\] = \[4\] or .*; got \[3\]"),
    "keys": (rescale(9), r"Rescale.keys must be \[batch\|1, key\] = \[2\|1, 5\]; got \[1, 9\]"),
    "rows": (rescale(rows=bools(1, 6)), r"Rescale.rows must be .*; got \[1, 6\]"),
    "condition": (
        rescale(condition=RowCondition(bools(1, 4), bools(1, 5), 1, 0)),
        r"of must be .*; got \[1, 4\]",
    ),
    "pattern": (MixPattern(bools(4), 0.5, OnKeys(bools(3, 5))), r"MixPattern.keys must be .*; got \[3, 5\]"),
    "ids": (MixPattern(bools(4), 0.5, Matching(torch.zeros(3, 5).long())), r"ids must be .*; got \[3, 5\]"),
    "map": (
        MixPattern(bools(4), 0.5, Fixed(torch.ones(1, 3, 6, 5))),
        r"weights must be .*; got \[1, 3, 6, 5\]",
    ),
    "queries": (BlockScores(bools(4), bools(1, 5), bools(1, 5)), r"queries must be .*; got \[1, 5\]"),
    "bias": (BiasKeys(bools(4), torch.zeros(1, 3, 5)), r"BiasKeys.bias must be .*; got \[1, 3, 5\]"),
}


def call(backend: str, edit: object = None, **changed: tuple[int, ...]) -> None:
    shapes = {"q": Q, "k": K, "v": K, **changed}
    made = {name: torch.zeros(shape) for name, shape in shapes.items()}
    q, k, v = (made.pop(name) for name in "qkv")
    score = isinstance(edit, BlockScores | BiasKeys)
    rule = ScoreRule(0.3, Mask(6, 5), edits=(edit,) if score else (), **made)
    attend(q, k, v, rule, () if score or edit is None else (edit,), backend)  # type: ignore[arg-type]


@pytest.fixture
def as_users_have_it() -> Iterator[None]:
    """Signatures are not checked, as outside of the tests."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.usefixtures("as_users_have_it")
@pytest.mark.parametrize("backend", ["auto", "blocked", "reference", "flash"])
def test_a_call_that_does_not_fit_is_refused(backend: str) -> None:
    assert backend in NAMES
    call("auto")
    for name, (changed, message) in CASES.items():
        with pytest.raises(ValueError, match=message) as caught:
            call(backend, **changed)
        assert "\n" not in str(caught.value), name
    for edit, message in EDITS.values():
        with pytest.raises(ValueError, match=message):
            call(backend, edit)


def test_a_tensor_field_without_a_shape_says_where_to_add_it() -> None:
    @dataclass(frozen=True)
    class New:
        columns: torch.Tensor

    with pytest.raises(TypeError, match=r"^New\.columns: add its shape to SHAPES in kernels/rules/fits\.py$"):
        call("auto", New(bools(1, 5)))


def test_every_tensor_of_an_edit_has_a_shape_that_is_held() -> None:
    """A new edit whose tensors have a name of their own says their shape in SHAPES."""
    names = set()
    for kind in (*vars(scores).values(), *vars(weights).values()):
        if isinstance(kind, type) and hasattr(kind, "__dataclass_fields__") and hasattr(kind, "apply"):
            names |= {f.name for f in fields(kind) if str(f.type).startswith("Tensor")}
    assert names >= {"heads", "keys", "queries"}
    assert names - set(SHAPES) == set()
