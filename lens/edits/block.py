"""`EditBlock`: what `model.edit(…)` returns, the block inside of which edits act."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, NoReturn

from headwater.lens.attention import context, shortening
from headwater.lens.attention.module_hooks import on
from headwater.lens.edits.base import Edit, Prepared
from headwater.lens.errors import EditError
from headwater.lens.models.opened import Opened
from headwater.lens.running.ids import reading

WITH = "write `with model.edit(…):` and run the model inside that block"


class _NotABlock(EditError, AttributeError):
    """A method that was asked of the block and not of the model."""


class EditBlock(contextlib.AbstractContextManager[None]):
    """`with EditBlock(…):` the prepared edits are on, in this context only.

    One that is thrown away unused warns, as `model.edit(…)` on a line of its own does nothing.
    """

    def __init__(self, model: Opened, prepared: Sequence[Prepared]) -> None:
        self._model, self._prepared = model, prepared
        self._entered: list[contextlib.ExitStack] = []
        self._used = False

    def __enter__(self) -> None:
        self._used = True
        with contextlib.ExitStack() as stack:
            if any(p.reads_tokens for p in self._prepared):
                stack.enter_context(reading(self._model))
            stack.enter_context(context.editing(self._model.key, self._prepared))
            for one in self._prepared:
                for module, before, after, early in one.hooks:
                    acts = [_where_on(act, one, self._model.key) for act in (before, after)]
                    stack.enter_context(on(module, *acts, early=early))
            self._entered.append(stack.pop_all())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._entered.pop().__exit__(kind, error, trace)
        shortening.begin(None)  # a run that failed has not said that its block ended

    def __getattr__(self, name: str) -> NoReturn:
        raise _NotABlock(f"model.edit(…) is a block and has no {name!r}; {WITH}")

    def __del__(self) -> None:
        if not vars(self).get("_used", True) and self._prepared:
            warnings.warn(f"model.edit(…) changed nothing, because it stands alone; {WITH}", stacklevel=2)


def checked(given: object) -> Edit:
    """The edit; EditError with the mend for anything else."""
    if isinstance(given, Edit):
        return given
    if isinstance(given, list | tuple) and given and all(isinstance(each, Edit) for each in given):
        raise EditError(
            f"model.edit takes edits one by one; got a {type(given).__name__} of {len(given)}, as recipes return: "
            "write model.edit(*edits) with a star"
        )
    if isinstance(given, type) and issubclass(given, Edit):
        raise EditError(
            f"model.edit takes an edit; got the class {given.__name__}: give hw.{given.__name__}(…)"
        )
    if isinstance(given, dict):
        raise EditError("model.edit takes an edit; got a dict: give hw.edit_from_dict(…) of it")
    raise EditError(f"model.edit takes edits such as hw.ScaleHeads({{'2.3': 0.0}}); got {given!r:.80}")


def _where_on(act: Callable[..., Any] | None, prepared: Prepared, key: object) -> Any:
    """The hook function, for runs in which the edit is on: `context.unedited` switches edits off inside the block."""
    return act and (lambda *given: act(*given) if prepared in context.active(key) else None)
