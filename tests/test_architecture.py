"""The promises of the folders: who may import whom, where heavy libraries live, where tests stand, how large a file may
grow."""

import ast
import functools
import graphlib
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("kernels", "lens", "analyses", "dashboard")  # each may import itself and those before it
ROOMS = {  # the sub-folders and files of each folder: each may import itself and those before it
    "kernels": "notebook threads tiles edits rules reference compiled backends maps mixers attend repeated",
    "lens": "errors files journal progress digest media naming attention models examples mixers records losses"
    " prompts running edits transformer_lens model foreign diffusion trained samples loading recipes experiments",
    "analyses": "_catalogue _prompts _measures _runs _streams _inputs tokens explanations heads caches sinks"
    " logits vision circuits _corpora _sweeps",
    "dashboard": "tables figures charts canvas state running widgets export pages parts sidebar frame views app launch"
    " __main__",
}
FILES = sorted(path for folder in (*FOLDERS, "data") for path in (ROOT / folder).rglob("*.py"))
FACE = sorted((ROOT / "headwater").glob("*.py")) + sorted((ROOT / "headwater" / "command").glob("*.py"))
HOMES = {  # library: the folders or files that may import it
    "triton": ("kernels/backends/triton/",),
    "transformer_lens": ("lens/transformer_lens/",),
    "transformers": ("lens/", "data/"),
    "plotly": ("dashboard/",),
    "tqdm": ("lens/progress.py", "data/"),
    "streamlit": ("dashboard/",),
    "numba": ("kernels/compiled/",),
    "ray": ("analyses/_sweeps/ray_actors.py",),
}
MIRRORED = ("kernels", "lens", "analyses")
LONGEST = 400  # lines of a file
FULLEST = 25  # files of a room


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def module_of(path: Path) -> str:
    """`headwater.lens.model` for lens/model.py; a package for its __init__.py."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    start = () if parts[0] == "headwater" else ("headwater",)
    return ".".join(part for part in (*start, *parts) if part != "__init__")


MODULES = {module_of(path): path for path in (*FILES, *FACE)}


@functools.cache
def imports_of(path: Path) -> tuple[str, ...]:
    """Every module a file imports, at its top or inside functions; type-checking blocks included."""
    found: list[str] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            inner = [f"{module}.{alias.name}" for alias in node.names]
            # `from headwater import lens` names a folder, and `from headwater.lens.models import parts` a file
            found += [module] if module == "headwater" else []
            found += (name if name in MODULES or module == "headwater" else module for name in inner)
    return tuple(found)


def opening(path: Path) -> str:
    return ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""


def room_of(module: str) -> str:
    """`lens.records` for everything in that folder; the file itself where it lies in no sub-folder."""
    return ".".join(module.split(".")[1:3])


def circle(graph: dict[str, set[str]]) -> list[str]:
    """The names along one circle of imports, or nothing."""
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


def test_imports_run_one_way() -> None:
    wrong = []
    for path in FILES:
        folder = path.relative_to(ROOT).parts[0]
        below = FOLDERS[: FOLDERS.index(folder) + 1] if folder in FOLDERS else ("data",)
        allowed = {*below, "data"} if folder == "lens" else set(below)
        for module in imports_of(path):
            first, *rest = module.split(".")
            if module.startswith("."):
                wrong.append(f"{name_of(path)}: relative import {module}: write headwater.{folder}…")
            elif first in {*FOLDERS, "data"}:
                wrong.append(f"{name_of(path)}: {module} without headwater. in front")
            elif first == "headwater" and rest and rest[0] in {*FOLDERS, "data", "command"} - allowed:
                wrong.append(f"{name_of(path)}: {folder} must not import {module}")
            elif module == "headwater" and folder != "dashboard":
                wrong.append(
                    f"{name_of(path)}: import headwater.<folder>.<file>, the public face is above {folder}"
                )
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("folder", FOLDERS)
def test_rooms_stand_in_their_order(folder: str) -> None:
    order = ROOMS[folder].split()
    wrong = []
    for path in (ROOT / folder).rglob("*.py"):
        room = path.relative_to(ROOT / folder).with_suffix("").parts[0]
        assert room in order, f"{name_of(path)}: give the room its place in ROOMS"
        for module in imports_of(path):
            if module.startswith(f"headwater.{folder}."):
                other = module.split(".")[2]
                if order.index(other) > order.index(room):
                    wrong.append(f"{name_of(path)} imports {module}, but {room} stands below {other}")
    assert not wrong, "\n".join(wrong)


def test_no_circles() -> None:
    """Neither files nor rooms import each other in a circle, imports for annotations and in functions included."""
    files = {
        module: {name for name in imports_of(path) if name in MODULES} - {module}
        for module, path in MODULES.items()
    }
    assert not circle(files), " → ".join(circle(files))
    rooms: dict[str, set[str]] = {}
    for module, others in files.items():
        rooms.setdefault(room_of(module), set()).update(map(room_of, others))
    rooms = {room: others - {room} for room, others in rooms.items()}
    assert not circle(rooms), " → ".join(circle(rooms))


def test_every_room_is_small_and_opens_with_its_promise() -> None:
    wrong = []
    for room in sorted({path.parent for path in FILES if path.relative_to(ROOT).parts[0] in FOLDERS}):
        count = len(list(room.glob("*.py")))
        if count > FULLEST:
            wrong.append(f"{name_of(room)} has {count} files; the most is {FULLEST}")
        if room.parent == ROOT or "dashboard" in room.parts:
            continue
        first = opening(room / "__init__.py").split("\n\n")[0].replace("\n", " ")
        if not re.fullmatch(r"[A-Z`].+[.:]", first) or ". " in first:
            wrong.append(f"{name_of(room)}/__init__.py does not open with one sentence: {first!r}")
    assert not wrong, "\n".join(wrong)


def test_tests_mirror_the_folders() -> None:
    """An analysis has a test file of its name; other code has one, or a test beside it opens with the file's name."""
    wrong = []
    for path in FILES:
        folder, *rooms, name = path.relative_to(ROOT).parts
        private = any(part.startswith("_") for part in (*rooms, name))
        if folder not in MIRRORED or name == "__init__.py":
            continue
        tests = (ROOT / "tests" / folder).joinpath(*rooms)
        if (tests / f"test_{name.lstrip('_')}").exists():
            continue
        if folder == "analyses" and not private:
            wrong.append(f"{name_of(path)}: there is no {name_of(tests)}/test_{name}")
        elif folder != "analyses" and not any(f"`{name}`" in opening(test) for test in tests.glob("*.py")):
            wrong.append(
                f"{name_of(path)}: neither {name_of(tests)}/test_{name} nor a test there that names it"
            )
    assert not wrong, "\n".join(wrong)


def test_heavy_libraries_stay_at_home() -> None:
    wrong = [
        f"{name_of(path)} imports {library}"
        for path in FILES
        for library in {module.split(".")[0] for module in imports_of(path)}
        if not name_of(path).startswith(HOMES.get(library, ""))
    ]
    assert not wrong, "\n".join(wrong)


def test_module_hooks_are_put_on_in_one_place() -> None:
    users = [name_of(path) for path in FILES if "register_forward" in path.read_text(encoding="utf-8")]
    assert users == ["lens/attention/module_hooks.py"]


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
    written = [*FILES, *FACE, *(ROOT / "tests").rglob("*.py")]
    lengths = {name_of(path): len(path.read_text(encoding="utf-8").splitlines()) for path in written}
    assert {name: length for name, length in lengths.items() if length > LONGEST} == {}


def test_the_page_gives_the_promise_of_every_room() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `([\w/]+)/` \| (.+) \|$", page.partition("## Rooms")[2], re.M))
    promises = {
        file.parent.relative_to(ROOT).as_posix(): (
            ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
        )
        for folder in (*MIRRORED, "headwater/command")
        for file in (ROOT / folder).rglob("__init__.py")
    }
    assert rows == {room: text.partition("\n\n")[0].replace("\n", " ") for room, text in promises.items()}


def test_every_dependency_has_its_reason() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    wanted = [text for group in groups for text in group]
    names = {re.split(r"[\[<>=; ]", text)[0] for text in wanted} - {"headwater"}
    reasons = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert {name for name in names if f"| {name} |" not in reasons} == set()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import headwater", "triton streamlit plotly transformer_lens"),
        ("import headwater; headwater.load", "streamlit plotly transformer_lens"),
        ("import headwater.command.cli", "torch transformers numpy pandas xarray rich streamlit plotly"),
        (
            "from headwater.command import listing; listing.as_text(); listing.as_json()",
            "torch transformers numpy pandas xarray networkx rich streamlit plotly",
        ),
    ],
)
def test_importing_stays_light(statement: str, absent: str) -> None:
    code = f"import sys\n{statement}\nprint(*sorted(sys.modules.keys() & set({absent.split()!r})))"
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert run.stdout.split() == []
