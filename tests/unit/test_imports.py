"""Imports point up one list: a module uses only what stands above it."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import treeify

ROOT = Path(treeify.__file__).parent

# The data flow, from plain values to the command line. A package is one entry: inside it, files may
# use one another. A new module goes where everything it needs is above it.
LAYERS = (
    "errors",
    "registry",
    "seeds",
    "files",
    "tree",
    "storage",
    "architecture",
    "shallower",
    "aliases",
    "functional",
    "unseen",
    "copies",
    "stand_ins",
    "proxies",
    "shortcuts",
    "tracer",
    "running",
    "trace",
    "packing",
    "program",
    "splits",
    "rules",
    "rewrite",
    "fused",
    "fusion",
    "machine",
    "execution",
    "initialize",
    "tuning",
    "anytime",
    "deadline",
    "confidence",
    "ensemble",
    "api",
    "held",
    "parity",
    "allocator",
    "models",
    "losses",
    "metrics",
    "data",
    "batches",
    "recipe",
    "recipe_file",
    "cost",
    "checkpoint",
    "snapshot",
    "run_directory",
    "interrupt",
    "sync",
    "progress",
    "processes",
    "objective",
    "optimization",
    "trainer",
    "ablation",
    "coverage",
    "proof",
    "sweep",
    "report",
    "export",
    "cli",
    "__main__",
)

FILES = sorted(ROOT.rglob("*.py"))


def layer_of(file: Path) -> str:
    return file.relative_to(ROOT).with_suffix("").parts[0]


def imported_layers(file: Path) -> Iterator[str]:
    """The layers a file imports; "" stands for the whole package, `import treeify`."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "treeify":
            modules = [f"treeify.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno} imports relatively"
            modules = [node.module or ""]
        else:
            continue
        for module in modules:
            top, _, rest = module.partition(".")
            if top == "treeify":
                yield rest.partition(".")[0]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_point_up_the_list(file: Path) -> None:
    layer = layer_of(file)
    if layer == "__init__":
        return
    assert layer in LAYERS, f"give treeify/{layer} its place in LAYERS"
    above = {*LAYERS[: LAYERS.index(layer)], layer}
    below = set(imported_layers(file)) - above
    assert not below, f"{layer} imports {sorted(below)}, which the list puts below it"
