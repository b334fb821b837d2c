"""Imports point one way: a room uses only itself and those before it."""

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import treeify

PACKAGE = Path(treeify.__file__).parent

# The data flow, from plain values to the command line: single files, then rooms.
FILES = ("errors", "arguments", "registry", "files", "seeds", "tree", "losses")
ROOMS = (
    "models",
    "data",
    "tracing",
    "engine",
    "anytime",
    "rules",
    "fusion",
    "conversion",
    "evaluation",
    "parity",
    "planning",
    "training",
    "deploy",
    "report",
    "share",
    "cli",
)
ORDER = (*FILES, *ROOMS)

MODULES = {
    ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): file
    for file in sorted(PACKAGE.rglob("*.py"))
}


def imports(file: Path) -> Iterator[str]:
    """The modules of treeify that a file imports, at its top or inside of functions."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno} imports relatively"
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                module = name if name in MODULES else node.module
                if module in MODULES:
                    yield module


def room(module: str) -> str:
    """The room or single file that a module belongs to; "" for the package itself."""
    return module.split(".")[1] if "." in module else ""


def test_the_list_is_what_exists() -> None:
    found = {path.name for path in PACKAGE.iterdir() if any(path.glob("*.py"))}
    assert found == set(ROOMS)
    assert {path.stem for path in PACKAGE.glob("*.py")} == {"__init__", "__main__", *FILES}


@pytest.mark.parametrize("name", ROOMS)
def test_a_room_says_what_it_is(name: str) -> None:
    text = ast.get_docstring(ast.parse((PACKAGE / name / "__init__.py").read_text("utf-8")))
    assert text is not None
    assert len(text.splitlines()) >= 2


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_one_way(module: str) -> None:
    here = room(module)
    if here in ("", "__main__"):
        return
    before = {*ORDER[: ORDER.index(here)], here}
    after = {room(other) for other in imports(MODULES[module])} - before
    assert not after, f"{module} imports {sorted(after)}, which come after it"


def test_no_module_imports_itself_by_way_of_others() -> None:
    # A package gathers the names of its files, which may use one another.
    files = {name: file for name, file in MODULES.items() if file.name != "__init__.py"}
    graph = {name: set(imports(file)) & set(files) for name, file in files.items()}
    TopologicalSorter(graph).prepare()


def test_tests_mirror_the_rooms() -> None:
    here = Path(__file__).parent
    folders = {path.name for path in here.iterdir() if any(path.glob("test_*.py"))}
    assert folders == {*ROOMS, "cases", "docs", "examples", "faults"}
