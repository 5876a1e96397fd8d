"""What is put into pages when the site is built: signatures under each analysis, the public names, the examples."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import headwater as hw
from headwater import analyses
from headwater._analyses import COMPANIONS
from headwater.lens.edits import EDITS

ROOT = Path(__file__).parents[2]
MODULES = {"headwater.analyses": analyses, "headwater.recipes": hw.recipes, "headwater.losses": hw.losses}
HOMES = {"headwater": hw, **MODULES}
MODEL = {"HookedModel", "load", "remove_heads"}
RECORD = {"Record", "AttentionMap"}
WITH_METHODS = {"HookedModel", "Record", "AttentionMap", "Experiment", "Head"}


def complete(app, docname: str, source: list[str]) -> None:
    """The listener for pages that are read: `source` holds the text of one."""
    if docname.startswith("analyses/"):
        source[0] = with_signatures(source[0])
    elif docname in REFERENCE:
        source[0] += "\n" + "\n".join(REFERENCE[docname]())
    elif docname == "gallery":
        source[0] += "\n" + gallery()


def with_signatures(text: str) -> str:
    """A page of analyses with the signature and the docstring at the end of each section."""
    head, *sections = re.split(r"^(?=## )", text, flags=re.MULTILINE)
    out = [head]
    for section in sections:
        found = re.match(r"## (\w+): ", section)
        out.append(section.rstrip() + "\n\n" + (entry(f"headwater.analyses.{found[1]}") if found else ""))
    return "\n".join(out)


def entry(path: str) -> str:
    """The block of Markdown that has autodoc write about one name, and about the methods of a class."""
    home, _, name = path.rpartition(".")
    is_class = inspect.isclass(getattr(HOMES[home], name))
    members = "\n   :members:\n   :inherited-members: BaseModel, tuple" if name in WITH_METHODS else ""
    return f"```{{eval-rst}}\n.. auto{'class' if is_class else 'function'}:: {path}{members}\n```\n"


def names_of(kind: str) -> list[str]:
    """The public names of one page of the reference; each public name is on exactly one."""
    rest = [n for n in hw.__all__ if n != "__version__" and f"headwater.{n}" not in MODULES]
    return {
        "model": [n for n in rest if n in MODEL],
        "record": [n for n in rest if n in RECORD],
        "edits": [n for n in rest if n in EDITS] + ["edit_from_dict"],
        "other": [n for n in rest if n not in MODEL | RECORD | set(EDITS) | {"edit_from_dict"}],
    }[kind]


def _public(kind: str) -> list[str]:
    return [entry(f"headwater.{name}") for name in names_of(kind)]


def _recipes() -> list[str]:
    return [entry(f"headwater.recipes.{name}") for name in hw.recipes.__all__]


def _losses() -> list[str]:
    return [entry(f"headwater.losses.{name}") for name in hw.losses.__all__]


def _companions() -> list[str]:
    return [entry(f"headwater.analyses.{name}") for name in COMPANIONS]


REFERENCE = {
    "reference/model": lambda: _public("model"),
    "reference/record": lambda: _public("record"),
    "reference/edits": lambda: _public("edits"),
    "reference/recipes": _recipes,
    "reference/losses": _losses,
    "reference/other": lambda: [*_public("other"), *_companions()],
}


def gallery() -> str:
    """Each example: its first line, its figure where it has one, and its source."""
    out = []
    for script in sorted((ROOT / "examples").glob("*.py"), key=lambda file: (file.name[0] == "_", file.name)):
        told = (ast.get_docstring(ast.parse(script.read_text(encoding="utf-8"))) or "").split("\n\n")[0]
        figure = ROOT / "docs" / "real" / f"{script.stem}.svg"
        out.append(f"## {script.stem.strip('_').replace('_', ' ').capitalize()}\n\n{told}\n")
        if figure.exists():
            out.append(f"![{script.stem}](real/{figure.name})\n")
        out.append(f"````{{literalinclude}} ../examples/{script.name}\n:language: python\n````\n")
    return "\n".join(out)
