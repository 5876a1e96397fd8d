"""The promises of the folders: who may import whom, where heavy libraries live, how large a file may grow."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("kernels", "lens", "analyses", "dashboard")  # each may import itself and those before it
FILES = sorted(path for folder in (*FOLDERS, "data") for path in (ROOT / folder).rglob("*.py"))
HOMES = {  # library: the folders or files that may import it
    "triton": ("kernels/backends/triton/",),
    "transformer_lens": ("lens/transformer_lens/",),
    "transformers": ("lens/", "data/"),
    "plotly": ("dashboard/",),
    "streamlit": ("dashboard/",),
}
LONGEST = 400


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports_of(path: Path) -> Iterator[str]:
    """Every module a file imports, at its top or inside functions; type-checking blocks included."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            # `from headwater import lens` names a folder too
            yield "." * node.level + (node.module or "")
            if node.module == "headwater":
                yield from (f"headwater.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_run_one_way(path: Path) -> None:
    folder = path.relative_to(ROOT).parts[0]
    below = FOLDERS[: FOLDERS.index(folder) + 1] if folder in FOLDERS else ("data",)
    allowed = {*below, "data"} if folder == "lens" else set(below)
    for module in imports_of(path):
        assert not module.startswith("."), f"relative import {module}: write headwater.{folder}…"
        first, *rest = module.split(".")
        assert first not in {*FOLDERS, "data"}, f"{module} without headwater. in front"
        if first == "headwater" and rest:
            assert rest[0] not in {*FOLDERS, "data"} - allowed, f"{folder} must not import {module}"
        if module == "headwater":
            assert folder == "dashboard", (
                f"{folder} must import headwater.<folder>.<file>, the public face is above it"
            )


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_heavy_libraries_stay_at_home(path: Path) -> None:
    for library, homes in HOMES.items():
        if not name_of(path).startswith(homes):
            assert library not in {module.split(".")[0] for module in imports_of(path)}


def test_figures_know_no_streamlit_and_views_no_mathematics() -> None:
    for path in (ROOT / "dashboard" / "figures").rglob("*.py"):
        assert not any(module.startswith("streamlit") for module in imports_of(path)), path
    for path in (ROOT / "dashboard" / "views").rglob("*.py"):
        assert not {"torch", "scipy"} & {module.split(".")[0] for module in imports_of(path)}, path


def test_folders_are_parts_of_headwater_not_packages_of_their_own() -> None:
    for folder in (*FOLDERS, "data"):
        assert not (ROOT / folder / "__init__.py").exists()
        link = ROOT / "headwater" / folder
        assert link.is_symlink()
        assert link.resolve() == ROOT / folder


def test_no_file_is_too_long() -> None:
    written = [*FILES, *(ROOT / "headwater").glob("*.py"), *(ROOT / "tests").rglob("*.py")]
    lengths = {name_of(path): len(path.read_text(encoding="utf-8").splitlines()) for path in written}
    assert {name: length for name, length in lengths.items() if length > LONGEST} == {}


def test_every_dependency_has_its_reason() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    wanted = [text for group in groups for text in group]
    names = {re.split(r"[\[<>=; ]", text)[0] for text in wanted} - {"headwater"}
    reasons = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert {name for name in names if f"| {name} |" not in reasons} == set()


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import headwater", "triton streamlit plotly transformer_lens"),
        ("import headwater; headwater.load", "streamlit plotly transformer_lens"),
        ("import headwater.command.cli", "torch transformers numpy pandas xarray rich streamlit plotly"),
    ],
)
def test_importing_stays_light(statement: str, absent: str) -> None:
    code = f"import sys\n{statement}\nprint(*sorted(sys.modules.keys() & set({absent.split()!r})))"
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert run.stdout.split() == []
