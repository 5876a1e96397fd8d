"""Where input tokens enter a model as vectors, what the vectors are in a run, and runs from other ones.

Words enter as the output of their embedding table, patches of a picture as that of the layer that embeds patches.
Sound, texts in which pictures or sound take places, and vectors that the caller gives, enter as the stream in front of
the first block.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from headwater.analyses._prompts.examples import outputs_of
from headwater.lens.attention.module_hooks import Given, hidden_states, on, with_hidden_states
from headwater.lens.errors import AnalysisError
from headwater.lens.model import HookedModel
from headwater.lens.models.axes import TEXTS, axis
from headwater.lens.models.inputs import VECTORS
from headwater.lens.models.part_axes import CONSTANT
from headwater.lens.models.signature import FLOATS, compares, embedding
from headwater.lens.naming.tokens import Tokens

Change = Callable[[Tensor], Tensor]  # vectors [row, token, feature] → others in their place
EMBEDS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)  # layers that embed patches


@dataclass(frozen=True, eq=False)
class Entrance:
    """Where vectors [row, token, feature] enter: behind `module`, or with `before` in front of it.

    `places` are the positions of the side's axis that enter there: all, or a tower's patches without class and register
    tokens, bool [position].
    """

    module: nn.Module
    before: bool
    places: Tensor

    @property
    def table(self) -> Tensor | None:
        """The vectors of all words, [word, feature], where words enter."""
        if not isinstance(self.module, nn.Embedding):
            return None
        with torch.no_grad():  # some tables scale what they give
            return self.module(torch.arange(self.module.num_embeddings, device=self.module.weight.device))

    def rows(self, found: Tensor) -> Tensor:
        """[row, token, feature] from the module's own layout.

        Convolutions have features in front of the grid. Packed patches [patch, feature] have no axis of rows; those of
        equal rows stand behind each other.
        """
        if isinstance(self.module, nn.Conv2d | nn.Conv3d):
            return found.flatten(2).mT
        return found if found.dim() > 2 else found.unflatten(0, (-1, int(self.places.sum())))

    def layout(self, rows: Tensor, like: Tensor) -> Tensor:
        """The module's own layout of `rows` [row, token, feature]."""
        rows = rows.mT if isinstance(self.module, nn.Conv2d | nn.Conv3d) else rows
        return rows.to(like).reshape(like.shape)


def sides_of(model: HookedModel) -> list[HookedModel]:
    """The parts whose tokens a prediction is computed from: this one's, or the encoder's and the decoder's."""
    cross = model.parts.get("cross")
    own = model.parts[model.part_name]
    if cross is None or own.queries != cross.queries:
        return [model]
    names = [n for n, p in model.parts.items() if not p.crosses and p.queries == cross.keys]
    names += [n for n, p in model.parts.items() if not p.crosses and p.queries == cross.queries]
    return [model.part(name) for name in names]


def has_words(side: HookedModel, given: Tensor) -> bool:
    """Whether the tokens of a part have ids: those of a text that is not given as vectors."""
    queries = side.parts[side.part_name].queries
    vectors = isinstance(given, Tokens) and VECTORS in given.more and queries != "decoder"
    return queries in TEXTS and not vectors


def entrance(side: HookedModel, given: Tokens) -> Entrance:
    """Where the tokens of a part enter in a run on `given`. AnalysisError where no input gives them."""
    part = side.parts[side.part_name]
    tokens = axis(part, part.queries, given)
    if tokens is None or part.queries in CONSTANT:
        raise AnalysisError(
            f"the tokens of {part.name} in {side.name} are learned queries, which no input gives; choose another part"
        )
    if not side.stack:
        raise AnalysisError(
            f"the blocks of {side.name} are not known, so neither is where its tokens enter; give one of transformers"
        )
    count = tokens.shape[1]
    every = torch.ones(count, dtype=torch.bool)
    first = _first_block(side)
    holds = not compares(side.hf) and any(name in FLOATS for name in given.more)
    if has_words(side, given) and not (holds and part.queries == "text"):
        table = _table(side, first)
        if table is not None:
            return Entrance(side.hf.get_submodule(table), False, every)
    if part.queries == "image" and part.patches is not None:
        places = part.patches.are_patches(count)
        found = _patch_layer(side, given, first, int(places.sum()))
        if found is not None:
            return Entrance(side.hf.get_submodule(found), False, places)
    return Entrance(side.hf.get_submodule(first), True, every)


def entering(model: HookedModel, given: Tensor, where: Sequence[Entrance]) -> list[Tensor]:
    """The vectors of a run on `given` at each entrance, [row, token, feature], without gradients."""
    kept: dict[int, Tensor] = {}

    def keep(found: Tensor, n: int) -> None:
        kept.setdefault(n, where[n].rows(found).detach())

    with contextlib.ExitStack() as stack, torch.no_grad():
        for n, each in enumerate(where):
            stack.enter_context(_hook(each, partial(keep, n=n)))
        outputs_of(model)(given)
    return [kept[n] for n in range(len(where))]


def run_from(
    model: HookedModel,
    given: Tensor,
    where: Sequence[Entrance],
    changes: Sequence[Change],
    grad: bool = False,
) -> Tensor:
    """What the model gives for `given` when each change takes the vectors [row, token, feature] of its entrance.

    The model reads ids and pictures all the same: it may find padding, positions or a text's end by them.
    """

    def put(found: Tensor, each: Entrance, change: Change) -> Tensor:
        return each.layout(change(each.rows(found)), found)

    with contextlib.ExitStack() as stack:
        for each, change in zip(where, changes, strict=True):
            act = partial(put, each=each, change=change)
            stack.enter_context(_hook(each, act))
        return outputs_of(model)(given, grad=grad)


def _hook(each: Entrance, act: Callable[[Tensor], Tensor | None]) -> contextlib.AbstractContextManager[None]:
    """`act` on the tensor with the vectors in each call of an entrance; what it gives, if anything, takes its place."""

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Given | None:
        found = act(hidden_states(args, kwargs))
        return None if found is None else with_hidden_states(args, kwargs, found)

    def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Any:
        return act(output)

    return on(each.module, before=before) if each.before else on(each.module, after=after)


def _first_block(side: HookedModel) -> str:
    """The path of the part's first block."""
    return side.stack[0].path


def _table(side: HookedModel, first: str) -> str | None:
    """The path of the embedding table of words that is nearest to a block; None without one."""
    own = embedding(side.hf)
    tables = {
        path: m is own
        for path, m in side.hf.named_modules()
        if isinstance(m, nn.Embedding) and m.num_embeddings == side.vocab
    }
    return max(tables, key=lambda path: (_shared(path, first), tables[path]), default=None)


def _patch_layer(side: HookedModel, given: Tokens, first: str, count: int) -> str | None:
    """The path of the layer in front of a tower's first block that gives `count` vectors per picture, from a run."""
    blocks = first.rpartition(".")[0] + "."
    layers: dict[nn.Module, str] = {
        m: path
        for path, m in side.hf.named_modules()
        if isinstance(m, EMBEDS) and not path.startswith(blocks)
    }
    found: list[str] = []
    reached: list[bool] = []

    def see(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if reached or not isinstance(output, Tensor) or output.dim() < 3:
            return
        spread = isinstance(module, nn.Conv2d | nn.Conv3d)
        if (output.shape[2:].numel() if spread else output.shape[-2]) == count:
            found.append(layers[module])

    def reach(module: nn.Module, args: Any, kwargs: Any) -> None:
        reached.append(True)

    with on(layers, after=see), on(side.hf.get_submodule(first), before=reach), torch.no_grad():
        outputs_of(side)(given)
    nearest = max((_shared(path, first) for path in found), default=0)
    return next((path for path in found if _shared(path, first) == nearest), None)


def _shared(one: str, other: str) -> int:
    """How many leading steps two paths share."""
    pairs = list(zip(one.split("."), other.split("."), strict=False))
    return next((n for n, (a, b) in enumerate(pairs) if a != b), len(pairs))
