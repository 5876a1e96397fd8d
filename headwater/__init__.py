"""Headwater: where attention comes from, where it goes, where it drains, and what happens when you change it.

Names are fetched when they are first used, so that `import headwater` costs next to nothing. `__init__.pyi` lists them.
"""

import ast
import importlib
from importlib.metadata import version
from pathlib import Path

from headwater import _analyses

__version__ = version("headwater")

analyses = _analyses.install()

_LIST = Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8")
_HOME = {
    alias.name: node.module
    for node in ast.parse(_LIST).body
    if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("headwater")
    for alias in node.names
}

__all__ = sorted([*_HOME, "__version__", "analyses"])  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(
            f"headwater has no {name!r}; it has {', '.join(n for n in __all__ if n[0] != '_')}"
        )
    home = importlib.import_module(_HOME[name])
    # a name that its package does not hold yet is a module in that package
    found = getattr(home, name, None) or importlib.import_module(f"{_HOME[name]}.{name}")
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return __all__
