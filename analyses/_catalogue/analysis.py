"""`@analysis` turns a function into an analysis: it checks the settings and describes the result in its attributes.

The docstring of the function describes the analysis, in paragraphs that begin with a label: `Question:`, `Unit:`,
`Source:`, `Cost:` and `Not for:`. The catalogue, the command line and the attributes of every result read them there.
"""

from __future__ import annotations

import functools
import inspect
import json
import sys
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeVar, overload

import networkx as nx
import xarray as xr

from headwater.analyses._catalogue.about import About, Maps, inputs_of, labelled
from headwater.analyses._catalogue.settings import checked, settings_of
from headwater.analyses._catalogue.sources import check_call
from headwater.lens.errors import AnalysisError
from headwater.lens.models.opened import Opened
from headwater.lens.records.provenance import as_attributes, free, provenance
from headwater.lens.records.record import Record

Given = ParamSpec("Given")
Result = TypeVar("Result")
LONGEST = 200  # characters of the longest setting that a result keeps
TEXTS = ("examples", "clean", "pairs")  # parameters that hold prompts
UNKEPT = ("resume", "batch_size")  # settings that change how a run goes and not its result


@overload
def analysis(function: Callable[Given, Result]) -> Callable[Given, Result]: ...
@overload
def analysis(
    *, keep: tuple[str, ...] = ("qk",), maps: Maps = "any", like: Any = None
) -> Callable[[Callable[Given, Result]], Callable[Given, Result]]: ...
def analysis(
    function: Any = None, *, keep: tuple[str, ...] = ("qk",), maps: Maps = "any", like: Any = None
) -> Any:
    """Wrap `function` so that it refuses settings and inputs that it can not take, and describes its result.

    `keep` is the content that a record needs for it; `maps="square"` refuses records of cross-attention. A companion
    of an analysis gives that analysis as `like` and shares all that is said about it. A record that was made with
    `grad=True` is read without its graph.
    """
    if function is None:
        return functools.partial(analysis, keep=keep, maps=maps, like=like)
    about = about_of(function, keep, maps) if like is None else like.about
    signature, run = inspect.signature(function), checked(function)

    @functools.wraps(function)
    def described(*args: Any, **kwargs: Any) -> Any:
        check_call(function.__name__, about.inputs, about.maps, signature, args, kwargs)
        args, kwargs = tuple(map(_plain, args)), {name: _plain(each) for name, each in kwargs.items()}
        result = run(*args, **kwargs)
        if isinstance(result, xr.DataArray | xr.Dataset | nx.DiGraph):
            attrs = result.graph if isinstance(result, nx.DiGraph) else result.attrs
            given = signature.bind(*args, **kwargs)
            given.apply_defaults()
            names = [s.name for s in settings_of(function) if s.name not in UNKEPT]
            told = {name: given.arguments[name] for name in names}
            told |= {
                name: getattr(value, "__name__", str(value))
                for name, value in given.arguments.items()
                if callable(value) and not isinstance(value, Opened)
            }
            texts = next((given.arguments[name] for name in TEXTS if name in given.arguments), None)
            found = _described(about, given.args[0], texts, told, attrs)
            attrs.clear()  # of what the analysis wrote under a name that is not free
            attrs.update(found)
        return result

    described.about = about  # type: ignore[attr-defined]
    return described


def about_of(function: Callable[..., Any], keep: tuple[str, ...], maps: Maps) -> About:
    """The labelled paragraphs of the docstring. ValueError where a label is missing."""
    if sys.flags.optimize > 1:
        raise AnalysisError(
            "python -OO removes the docstrings that describe the analyses; run it without -OO"
        )
    given = inspect.signature(function).parameters
    defaults = {name: each.default is not each.empty for name, each in given.items()}
    told = labelled(inspect.getdoc(function) or "", function.__name__)
    return About(**told, inputs=inputs_of(defaults), keep=keep, maps=maps)


def _described(
    about: About, source: Any, texts: Any, settings: Mapping[str, Any], own: Mapping[str, Any]
) -> dict[str, Any]:
    """Attributes of a result: model, edits, first token, settings, and the question with its unit, source and limits.

    Attributes that the analysis wrote win over settings as given, such as resolved heads.
    """
    origin: Mapping[str, Any] = {}
    if isinstance(source, Record):
        origin = as_attributes(source.provenance)
    elif isinstance(source, Opened):
        origin = as_attributes(provenance(source, texts))
    short = {name: x for name, x in settings.items() if len(repr(x)) <= LONGEST}
    asked = {name: getattr(about, name) for name in ("question", "unit", "paper", "not_for")}
    told = free({**short, **origin, **own, **asked})
    return {name: _storable(value) for name, value in told.items()}


def _plain(given: Any) -> Any:
    """A record without its graph: results are arrays, which hold none."""
    return given.detach() if isinstance(given, Record) else given


def _storable(value: Any) -> Any:
    """`value` in a type that netCDF stores; other types become JSON text."""
    if isinstance(value, bool):
        return int(value)
    if value is None:
        return ""
    if isinstance(value, str):
        return str(value)  # torch.__version__ is a subclass of str, which graph files refuse
    if isinstance(value, int | float):
        return value
    return json.dumps(value, default=str)
