"""The arguments and options that several commands share, and options with units."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from treeify.cli import quantities
from treeify.models.hub import local_path

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
Weights = Annotated[
    Path | None,
    typer.Option(
        metavar="PATH",
        help="Trained weights of the model: a file (.pth, .pt, .ckpt, .safetensors), or the"
        " directory of an ensemble or a run, also as hf-hub:org/name.",
    ),
]
Out = Annotated[
    Path | None, typer.Option(help="Directory to write, new or empty; by default converted/NAME.")
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Write even if the directory is not empty.")
]
NoVerify = Annotated[bool, typer.Option("--no-verify", help="Skip the parity check.")]
SavedEnsemble = Annotated[
    Path,
    typer.Argument(
        metavar="DIRECTORY",
        parser=local_path,
        help="Saved ensemble, or run directory (its last checkpoint is taken), also as"
        " hf-hub:org/name@revision.",
    ),
]
Trust = Annotated[
    bool,
    typer.Option(
        "--trust",
        help="Import and call what the directory names: if you trust whoever wrote it.",
    ),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead.")]


def duration(name: str, help: str) -> Any:
    """An option such as `--deadline 20ms`; its value is in seconds."""
    return _parsed(name, quantities.seconds, "TIME", help)


def milliseconds(name: str, help: str) -> Any:
    """An option such as `--max-ms 40`."""
    return _parsed(name, quantities.milliseconds, "MS", help)


def megabytes(name: str, help: str) -> Any:
    """An option such as `--max-mb 120`."""
    return _parsed(name, quantities.megabytes, "MB", help)


def bounds(name: str, help: str) -> Any:
    """An option such as `--leaves 4..32`."""
    return _parsed(name, quantities.bounds, "RANGE", help)


def count(name: str, help: str, metavar: str = "COUNT") -> Any:
    """An option such as `--budget 60M`."""
    return _parsed(name, quantities.count, metavar, help)


def numbers(name: str, help: str, *, positive: bool = False) -> Any:
    """An option such as `--mean 0.485,0.456,0.406`."""
    return _parsed(name, partial(quantities.numbers, positive=positive), "NUMBERS", help)


def whole_numbers(name: str, help: str) -> Any:
    """An option such as `--sizes 1,4,16`."""
    return _parsed(name, quantities.whole_numbers, "NUMBERS", help)


def size(name: str, help: str) -> Any:
    """An option such as `--input-size 96x160`."""
    return _parsed(name, quantities.size, "SIZE", help)


def part(name: str, help: str) -> Any:
    """An option such as `--shard 3/8`."""
    return _parsed(name, quantities.part, "K/N", help)


def _parsed(name: str, parse: Callable[[str, str], Any], metavar: str, help: str) -> Any:
    # The parser says whose text it could not read, as every other error does.
    return typer.Option(name, parser=lambda text: parse(text, name), metavar=metavar, help=help)


InputSize = Annotated[
    quantities.Size | None,
    size(
        "--input-size",
        "Height and width of its images, 96 or 96x160; by default what it is usually fed.",
    ),
]
