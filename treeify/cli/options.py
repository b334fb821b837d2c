"""The arguments and options that several commands share, and options with units."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

Name = Annotated[
    str,
    typer.Argument(
        metavar="NAME",
        help="Base model: timm's name, torchvision/NAME, or package.module:function.",
    ),
]
NumClasses = Annotated[
    int | None, typer.Option(min=1, help="Classes of the model; by default its own.")
]
InputSize = Annotated[
    int | None,
    typer.Option(min=1, help="Height and width of its images; by default what it is usually fed."),
]
SavedEnsemble = Annotated[
    Path,
    typer.Argument(help="Saved ensemble, or run directory (its last checkpoint is taken)."),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead.")]


def quantity(name: str, parse: Callable[[str, str], Any], metavar: str, help: str) -> Any:
    """An option whose text is parsed, with its name in the parser's errors.

    Args:
        name: of the option, such as `--deadline`.
        parse: from the text and the option's name to a value, such as `quantities.seconds`.
        metavar: stands for the text in the help.
        help: a sentence or two.
    """
    return typer.Option(name, parser=lambda text: parse(text, name), metavar=metavar, help=help)
