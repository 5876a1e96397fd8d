"""Independent ways for analyses of input tokens: slopes and blanks at the vectors that enter a model, by plain hooks.

Words enter as what their table gives, patches as what the first convolution of their tower gives. Sound, and texts in
which pictures take places, enter as the stream in front of the first block.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from headwater.command.matrix_plain import Plain
from headwater.lens.loading import zoo

Pairs = Iterator[tuple[Any, Any]]
BLANK = 3  # the token that words become
LEAST = 5e-4  # float32 rounds logits near 1 by 1e-7 to 1e-6, which is 1e-3 of smaller changes
MEDIA = {"pixel_values": (-2, -1), "input_features": (-1,), "input_values": (-1,)}  # axes of the mean
Inputs = dict[str, Tensor]


class Entrance:
    """A module whose output, or with `before` its input, holds the vectors; `ids` names the input that has words."""

    def __init__(self, module: nn.Module, before: bool, ids: str | None) -> None:
        self.module, self.before, self.ids = module, before, ids

    def hook(self, act: Callable[[Tensor], Tensor | None]) -> Any:
        """`act` on the vectors [row, token, feature] of each run; what it gives takes their place."""
        if not self.before:
            spread = isinstance(self.module, nn.Conv2d)

            def after(_: nn.Module, __: Any, output: Tensor) -> Tensor | None:
                found = act(output.flatten(2).mT if spread else output)
                return found if found is None or not spread else found.mT.reshape(output.shape)

            return self.module.register_forward_hook(after)

        def front(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            found = act(args[0] if args else kwargs["hidden_states"])
            if found is None:
                return None
            return ((found, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": found})

        return self.module.register_forward_pre_hook(front, with_kwargs=True)


def entrances(plain: Plain) -> list[Entrance]:
    """Of the part; of both sides where an encoder's tokens lead to a decoder's."""
    kind = zoo.FAMILIES[plain.subject.name.partition("/")[0]].kind
    part, hf = plain.subject.model.part_name, plain.hf
    if kind in ("seq2seq", "speech"):
        encoder, decoder = hf.get_encoder(), hf.get_decoder()
        if kind == "speech":
            source = Entrance(encoder.layers[0], True, None)
        else:
            source = Entrance(encoder.embed_tokens, False, "input_ids")
        return (
            [source]
            if part == "encoder"
            else [source, Entrance(decoder.embed_tokens, False, "decoder_input_ids")]
        )
    if kind == "image" or part == "vision":
        tower = (
            hf
            if kind == "image"
            else next(m for n, m in hf.named_modules() if n.endswith(("vision_tower", "vision_model")))
        )
        return [Entrance(next(m for m in tower.modules() if isinstance(m, nn.Conv2d)), False, None)]
    block = hf.get_submodule(plain.paths[0].rpartition(".")[0])
    if kind == "chat":
        return [Entrance(block, True, "input_ids")]
    if kind == "audio":
        return [Entrance(block, True, None)]
    if kind == "pair":
        return [Entrance(hf.text_model.embeddings.token_embedding, False, "input_ids")]
    return [Entrance(hf.get_input_embeddings(), False, "input_ids")]


def _given(plain: Plain) -> Inputs:
    return plain.inputs(plain.subject.examples)


def _scores(plain: Plain, given: Inputs, where: Sequence[Entrance], acts: Sequence[Any]) -> Tensor:
    """The score of each row when `acts` change what enters."""
    with contextlib.ExitStack() as stack:
        for each, act in zip(where, acts, strict=True):
            stack.callback(each.hook(act).remove)
        return plain.score(plain.answer(given))


def _vectors(plain: Plain, given: Inputs, where: Sequence[Entrance]) -> list[Tensor]:
    """What enters in a run on these inputs, [row, token, feature] of each side."""
    kept: list[Any] = [None] * len(where)

    def keeping(n: int) -> Callable[[Tensor], None]:
        def keep(found: Tensor) -> None:
            kept[n] = found.detach().clone() if kept[n] is None else kept[n]

        return keep

    with torch.no_grad():
        _scores(plain, given, where, [keeping(n) for n in range(len(where))])
    return kept


def _spread(plain: Plain, found: Any, values: Sequence[Tensor]) -> Tensor:
    """Values of each side at their positions, [row, key]: NaN at class, register and detection tokens."""
    joined = torch.cat(list(values), 1)
    behind = getattr(plain.hf.config, "num_detection_tokens", 0)
    before = found.shape[1] - joined.shape[1] - behind
    return nn.functional.pad(joined.detach(), (before, behind), value=float("nan"))


def _slopes(plain: Plain) -> tuple[list[Tensor], list[Tensor]]:
    """The vectors of each side, and the slopes of the score there."""
    where, given = entrances(plain), _given(plain)
    leaves = [rows.requires_grad_() for rows in _vectors(plain, given, where)]
    _scores(plain, given, where, [lambda _, rows=rows: rows for rows in leaves]).sum().backward()
    return leaves, [torch.zeros_like(x) if x.grad is None else x.grad for x in leaves]


def input_gradient(plain: Plain, found: Any) -> Pairs:
    _, slopes = _slopes(plain)
    yield found, _spread(plain, found, [each.norm(dim=-1) for each in slopes])


def input_x_gradient(plain: Plain, found: Any) -> Pairs:
    shares = [(x * slope).sum(-1) for x, slope in zip(*_slopes(plain), strict=True)]
    yield found, _spread(plain, found, shares)


def blank_out(plain: Plain, found: Any) -> Pairs:
    """A word becomes the blank token, what is no word the vector that the example's mean picture or sound gives."""
    where, given = entrances(plain), _given(plain)
    means = {
        name: x.mean(MEDIA[name], keepdim=True).expand_as(x) if name in MEDIA else x
        for name, x in given.items()
    }
    nearly = {name: x + 1e-8 * given[name] if name in MEDIA else x for name, x in means.items()}
    for one, other in zip(_vectors(plain, means, where), _vectors(plain, nearly, where), strict=True):
        if float((one - other).abs().max()) > 1e-3 * float(one.abs().max()):
            raise LookupError("a sound that stays the same is rounding behind a norm over time (HuBERT)")
    changes = []
    with torch.no_grad():
        whole = plain.score(plain.answer(given))
        for side, vectors in zip(where, _vectors(plain, means, where), strict=True):
            mine = []
            for place in range(vectors.shape[1]):
                if side.ids is not None and bool((given[side.ids][:, place] != zoo.IMAGE_TOKEN).all()):
                    ids = given[side.ids].clone()
                    ids[:, place] = BLANK
                    score = plain.score(plain.answer({**given, side.ids: ids}))
                else:
                    score = _scores(plain, given, [side], [_putting(place, vectors)])
                mine.append((whole - score).abs())
            changes.append(torch.stack(mine, 1))
    if max(float(each.max()) for each in changes) < LEAST:
        raise LookupError("the changes are too small for float32")
    yield found, _spread(plain, found, changes)


def _putting(place: int, vectors: Tensor) -> Callable[[Tensor], Tensor]:
    def put(rows: Tensor) -> Tensor:
        rows = rows.clone()
        rows[:, place] = vectors[:, place]
        return rows

    return put


INPUT_WAYS: dict[str, Callable[[Plain, Any], Pairs]] = {
    each.__name__: each for each in (input_gradient, input_x_gradient, blank_out)
}
