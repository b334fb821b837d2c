"""`treeify recipes`: the recipes that come with treeify, listed, shown and copied."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from treeify.cli.options import Json
from treeify.cli.output import Column, print_json, say, table
from treeify.errors import RecipeError
from treeify.training import shipped_recipes


def recipes(
    name: Annotated[
        str | None, typer.Argument(help="Recipe to show; without it all are listed.")
    ] = None,
    directory: Annotated[
        Path | None,
        typer.Argument(
            metavar="[DIR]", help="With --copy: where to, by default the current directory."
        ),
    ] = None,
    copy: Annotated[
        bool,
        typer.Option("--copy", help="Copy the recipe, and those it extends, to change them there."),
    ] = False,
    as_json: Json = False,
) -> None:
    """List the recipes that come with treeify, show one, or copy it.

    Commands find them by name: `treeify train digits_hne`. A file of that name wins.

    For example:

        treeify recipes

        treeify recipes digits_hne

        treeify recipes ablations/digits --copy mine
    """
    _check(name, directory, copy)
    console = Console(quiet=as_json)
    if name is None:
        _list(console, as_json)
    elif copy:
        _copy(console, name, directory or Path(), as_json)
    else:
        recipe = shipped_recipes.shipped(name)
        if as_json:
            print_json(recipe)
        say(console, recipe.path.read_text(encoding="utf-8").rstrip("\n"))


def _check(name: str | None, directory: Path | None, copy: bool) -> None:
    if directory is not None and not copy:
        raise RecipeError(
            f"{directory} was given without --copy.",
            expected="both, or neither",
            next_step=f"Copy the recipe there: treeify recipes {name} --copy {directory}",
        )
    if copy and name is None:
        raise RecipeError(
            "--copy was given without a recipe.",
            expected="treeify recipes NAME --copy",
            next_step="List them: treeify recipes",
        )


def _list(console: Console, as_json: bool) -> None:
    found = [shipped_recipes.shipped(name) for name in shipped_recipes.names()]
    if as_json:
        print_json(found)
    columns = [Column("name", no_wrap=True), Column("what it is"), Column("data")]
    rows = [(each.name, each.about, each.data, each.network) for each in found]
    say(
        console,
        table([*columns, Column("network")], rows),
        f"They are in {shipped_recipes.folder()}. Train one: treeify train digits_hne; grids are"
        " for treeify ablate.",
    )


def _copy(console: Console, name: str, directory: Path, as_json: bool) -> None:
    copies = shipped_recipes.copy(name, directory)
    if as_json:
        print_json({"copied": copies})
    recipe = shipped_recipes.shipped(name)
    command = "ablate" if recipe.is_grid else "train"
    say(console, *map(str, copies), f"Change it, then: treeify {command} {copies[0]}")
