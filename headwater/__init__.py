"""Headwater: where attention comes from, where it goes, where it drains, and what happens when you change it.

Names are fetched when they are first used, so that `import headwater` costs next to nothing. `__init__.pyi` lists them;
of the edits, each file of `lens/edits/` lists its own in `__all__`.
"""

import ast
import importlib
import re
from importlib.metadata import version
from pathlib import Path

from headwater import _analyses

__version__ = version("headwater")

analyses = _analyses.install()

_HERE = Path(__file__).parent
_HOME = {
    alias.name: str(node.module)
    for node in ast.parse((_HERE / "__init__.pyi").read_text(encoding="utf-8")).body
    if isinstance(node, ast.ImportFrom)
    for alias in node.names
    if str(node.module).startswith("headwater")
}
del _HOME["*"]
for _file in (_HERE / "lens" / "edits").glob("[!_]*.py"):
    _listed = re.search(r"^__all__ = (\[.*?\])", _file.read_text(encoding="utf-8"), re.M | re.S)
    _HOME |= dict.fromkeys(
        ast.literal_eval(_listed[1]) if _listed else (), f"headwater.lens.edits.{_file.stem}"
    )

__all__ = sorted([*_HOME, "__version__", "analyses"])  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        near = importlib.import_module("headwater.lens.errors").nearest
        raise AttributeError(f"headwater has no {name!r}: {near(name, [n for n in __all__ if n[0] != '_'])}")
    home = importlib.import_module(_HOME[name])
    # a name that its package does not hold yet is a module in that package
    found = getattr(home, name, None) or importlib.import_module(f"{_HOME[name]}.{name}")
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return __all__
