"""The recipes that come with treeify, found by name: `digits_hne`, `ablations/digits`.

They lie in `recipes/` of the repository; a wheel has them inside of the package (`setup.py`).
"""

import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from treeify import files
from treeify.errors import RecipeError, nearest
from treeify.training.ablation import Grid, Variant, load_grid
from treeify.training.recipe_file import load_recipe
from treeify.training.yaml_values import MOST_BYTES, parse

_ENDING = ".yaml"


@dataclass(frozen=True)
class ShippedRecipe:
    """A recipe, or a grid of them, that comes with treeify.

    Args:
        name: what commands find it by: its path in the folder without the ending.
        path: of its file.
        about: the first sentence of the comment that it begins with.
        data: its data set's name.
        network: its base model's name.
        is_grid: whether it is for `treeify ablate`.
    """

    name: str
    path: Path
    about: str
    data: str
    network: str
    is_grid: bool


def folder() -> Path:
    """Where the recipes are: in the installed package, else beside it, in a clone.

    Raises:
        RecipeError: neither has any.
    """
    package = Path(__file__).parents[1]
    inside, beside = package / "recipes", package.parent / "recipes"
    if inside.is_dir():
        return inside
    if (package.parent / "pyproject.toml").is_file() and beside.is_dir():
        return beside
    raise RecipeError(
        f"treeify in {package} came without its recipes.",
        expected=f"them in {inside}",
        next_step="Install it again: pip install --force-reinstall --no-deps treeify",
    )


def names() -> list[str]:
    """What the recipes are called; those of subfolders, such as `ablations/digits`, last."""
    root = folder()
    paths = (path.relative_to(root).with_suffix("") for path in root.rglob(f"*{_ENDING}"))
    return sorted((path.as_posix() for path in paths), key=lambda name: (name.count("/"), name))


def find(word: str | Path) -> Path:
    """The file that a user means: a path, or a recipe's name; a path that is there wins.

    Args:
        word: the ending may be left out of a name.

    Returns:
        The path as it was given if there is something, else that of the shipped recipe.

    Raises:
        RecipeError: there is neither; the message has the nearest names.
    """
    given = Path(word)
    if files.is_file(given) or files.is_directory(given):
        return given
    return _path(str(word))


def _path(name: str) -> Path:
    """The file of a shipped recipe; RecipeError if none has this name."""
    bare, known = name.removesuffix(_ENDING), names()
    if bare in known:
        return folder() / f"{bare}{_ENDING}"
    last = {each.rpartition("/")[2]: each for each in reversed(known)}
    close = nearest(bare, known) or nearest(Path(bare).name, last)
    raise RecipeError(
        f"{name!r} is no recipe.",
        expected="a YAML file, as docs/recipes.md describes it, or the name of a recipe that comes"
        " with treeify" + (f" (did you mean {close}?)" if close else ""),
        found=f"nothing of that name, from {Path.cwd()}",
        next_step="List them: treeify recipes. To train on a folder of images without one:"
        " treeify train --data FOLDER --model resnet18",
    )


def shipped(name: str) -> ShippedRecipe:
    """What a recipe says of itself.

    Raises:
        RecipeError: none has this name.
    """
    path = _path(name)
    text = path.read_text(encoding="utf-8")
    is_grid = "variants" in parse(text)[0]
    recipe = load_recipe(path.parent / load_grid(path).recipe if is_grid else path)
    return ShippedRecipe(
        path.relative_to(folder()).with_suffix("").as_posix(),
        path,
        _about(text),
        recipe.data.name,
        recipe.model.name,
        is_grid,
    )


def _about(text: str) -> str:
    """The first sentence of the comment at the top."""
    lines = [line.removeprefix("#").strip() for line in text.partition("\n\n")[0].splitlines()]
    paragraph = " ".join(lines[: lines.index("")] if "" in lines else lines)
    return re.split(r"(?<=\.)\s+(?=[A-Z])", paragraph, maxsplit=1)[0].rstrip(":")


def copy(name: str, target: Path) -> list[Path]:
    """Copy a recipe, and those it builds on, into a directory; what is there is not replaced.

    Relative paths in them go on leading from one to the other.

    Args:
        name: of the recipe.
        target: the directory; made if it is not there.

    Returns:
        The copies, that of the recipe itself first.

    Raises:
        RecipeError: there is no such recipe, or a file is there already, or cannot be written.
    """
    root = folder().resolve()
    copies = {
        source: target / source.relative_to(root)
        for source in dict.fromkeys(_with_bases(shipped(name).path.resolve()))
    }
    if there := [str(path) for path in copies.values() if path.exists()]:
        raise RecipeError(
            "a copy would replace files that are there.",
            expected=f"none of its files in {target}",
            found=", ".join(there),
            next_step="Copy it into another directory: treeify recipes NAME --copy DIR",
        )
    try:
        for source, path in copies.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            files.replace_file(path, partial(shutil.copyfile, source))
    except OSError as error:
        raise RecipeError(f"{target} cannot be written: {error}") from error
    return list(copies.values())


def _with_bases(path: Path) -> Iterator[Path]:
    """A recipe's or a grid's file, and all those that it names."""
    yield path
    values = parse(files.read_bytes(path, MOST_BYTES).decode())[0]
    bases = [values["extends"]] if "extends" in values else []
    if "variants" in values:
        bases += _recipes_of(load_grid(path))
    for base in bases:
        yield from _with_bases((path.parent / base).resolve())


def _recipes_of(grid: Grid) -> list[str]:
    variants = (each for each in grid.variants.values() if isinstance(each, Variant))
    return [grid.recipe, *(each.recipe for each in variants if each.recipe)]
