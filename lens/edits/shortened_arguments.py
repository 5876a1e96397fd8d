"""The arguments of a block for some of its tokens: what it is given by token is taken at their places."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from headwater.lens.attention.module_hooks import Given, with_hidden_states
from headwater.lens.attention.shortening import Places
from headwater.lens.errors import EditError


def shortened(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], states: Tensor, length: int, at: Places
) -> Given:
    """The arguments with `states` as hidden states, and what else is by token at these places of `length`.

    Masks are left: the attention function reads them whole. EditError for a tensor that is by token in an unknown way.
    """

    def taken(value: Any, name: str) -> Any:
        if isinstance(value, tuple | list) and not hasattr(value, "_fields"):
            return type(value)(taken(each, name) for each in value)
        if not isinstance(value, Tensor) or "mask" in name or length not in value.shape:
            return value
        if value.dim() == 4 and value.shape[-2:] == (length, length):
            return value  # a mask given by place
        axis = value.dim() - (2 if value.is_floating_point() and value.dim() > 1 else 1)
        if value.shape[axis] != length:
            raise EditError(
                f"PruneTokens: {type(module).__name__} is given {name or 'an argument'} of {list(value.shape)} for "
                f"{length} tokens, and it is not known which of it belongs to a token; prune another part"
            )
        return _along(value, axis, at)

    args, kwargs = with_hidden_states(args, kwargs, states)
    first = 1 if args else 0
    return (
        (*args[:first], *(taken(value, "") for value in args[first:])),
        {name: value if name == "hidden_states" else taken(value, name) for name, value in kwargs.items()},
    )


def _along(value: Tensor, axis: int, at: Places) -> Tensor:
    """The entries at the places along an axis, before which the axis of the batch stands, or none."""
    same = bool((at.at == at.at[:1]).all())
    if same:
        return value.index_select(axis, at.at[0].to(value.device))
    if axis == 0:
        return at.taken(value[None].expand(len(at.at), *value.shape), 1)
    rows = value.movedim(axis - 1, 0)
    rows = rows.expand(len(at.at), *rows.shape[1:])
    return at.taken(rows, axis).movedim(0, axis - 1)
