"""`treeify verify`: many models converted and checked, one JSON line each."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from treeify.cli.options import count, duration, part
from treeify.cli.output import say
from treeify.cli.quantities import Part
from treeify.conversion.splits import listed
from treeify.deploy.check import check_export
from treeify.deploy.directory import require_packages
from treeify.errors import InputError, printable
from treeify.models.builders import TIMM, check_names, library_names
from treeify.parity import results
from treeify.parity.results import META, Row
from treeify.parity.sweep import Settings, sweep, todo
from treeify.parity.sweep import shard as names_of_shard

FAILED = 1


def verify(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="NAME...",
            help="Models: timm's names, torchvision/NAME, or package.module:function.",
        ),
    ] = None,
    every: Annotated[
        bool, typer.Option("--all", help="Every classifier of timm and torchvision.")
    ] = False,
    shard: Annotated[
        Part, part("--shard", "Only the K-th of N parts, e.g. one part a machine.")
    ] = "1/1",  # type: ignore[assignment]  # parsed too, and shown in the help as it stands
    splits: Annotated[
        str, typer.Option(help="As for convert: how many, or names from input to output.")
    ] = "2",
    output: Annotated[
        Path,
        typer.Option(
            help="File of JSON lines to append to; models in it are skipped, unless they were not"
            " checked in full and may take more memory now, or are to be exported now."
        ),
    ] = Path("coverage.jsonl"),
    retry: Annotated[
        bool, typer.Option("--retry", help="Check those again that failed, as the file says.")
    ] = False,
    memory: Annotated[
        int,
        count(
            "--memory",
            "What a check may take. Models that need more are converted without weights, and their"
            " numbers checked with fewer blocks or not at all. The file says which.",
            metavar="BYTES",
        ),
    ] = "8G",  # type: ignore[assignment]
    time_limit: Annotated[
        float | None, duration("--time-limit", "What a model may take, such as 600s.")
    ] = None,
    export: Annotated[
        bool,
        typer.Option("--export", help="Also export each model, and compare what was written."),
    ] = False,
) -> None:
    """Convert models and prove that every leaf equals the untouched architecture.

    Each model, in a process of its own: leaf outputs in evaluation and training mode, gradients,
    every nested size, and a save and load; in float64 where float32 rounds too coarsely. It is then
    split once more, by name at a point inside a module, and the outputs are checked. A line of the
    output file says what was found. A sweep that was interrupted goes on where it stopped.

    With --export each is also exported as `treeify export` does, into a directory that is removed:
    a step for every nested size, whose answers are compared at two sizes of batches.

    Exit code 1 means that a model failed, or with --export that it cannot be exported.

    For example:

        treeify verify resnet18 torchvision/vit_b_16

        treeify verify --all --shard 3/8 --output coverage-3.jsonl
    """
    if export:
        require_packages()
    settings = Settings(splits, memory, time_limit, check_export if export else None)
    _check_plain(output)
    listed(splits)
    models = names_of_shard(_names(names or (), every), *shard)
    console = Console()
    if not models:
        say(console, f"Shard {shard} has no models: there are fewer of them than shards.")
        return
    coverage = results.read(output) if output.exists() else results.Coverage(())
    unchecked = todo(models, coverage, settings, retry=retry)
    if coverage.damaged:
        say(console, f"Lines of {output} that were cut off, and are ignored: {coverage.damaged}")
    if len(unchecked) < len(models):
        say(console, f"{len(models) - len(unchecked)} of {len(models)} are in {output} already.")
    if unchecked:
        results.check_writable(output)
    _check(console, unchecked, output, settings)
    coverage = results.read(output)
    if failed := todo(models, coverage, settings, retry=True):
        say(console, f"{len(failed)} of {len(models)} failed: {', '.join(failed)}")
        sys.exit(FAILED)
    proven = {row.name for row in coverage.present(splits) if row.proven}
    text = f"All {len(models)} passed."
    if unproven := [name for name in models if name not in proven]:
        text = (
            f"All {len(models)} converted, {len(models) - len(unproven)} proven; only shapes were"
            f" checked of {', '.join(unproven)}."
        )
    say(console, f"{text} Rows: {output}")


def _check(console: Console, names: Sequence[str], output: Path, settings: Settings) -> None:
    """Check the models; a live line on a terminal, and everywhere a line a model."""
    with Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(compact=True),
        console=console,
        disable=not console.is_terminal,
        transient=True,
    ) as progress:
        task = progress.add_task(printable(names[0]) if names else "", total=len(names))
        for position, row in enumerate(sweep(names, output, settings), 1):
            following = names[position] if position < len(names) else ""
            progress.update(task, advance=1, description=printable(following))
            say(console, f"{position}/{len(names)} {row.name}: {_line(row)}")


def _line(row: Row) -> str:
    """The outcome of a check."""
    memory = "" if row.peak_memory is None else f", {row.peak_memory / 1e9:.2f} GB"
    spent = f"{row.seconds:.1f} s{memory}"
    if row.failure is not None:
        return f"FAILED ({row.how or 'not built'}): {row.failure} ({spent})"
    fraction = "" if row.packed_fraction is None else f", {row.packed_fraction:.1%} of MACs packed"
    if row.how == META:
        reason = "" if row.shortage is None else f": {row.shortage}"
        return f"converted, shapes checked (meta){reason}{fraction} ({spent})"
    text = f"proven ({row.how}), off by {row.worst:.2g} of the tolerance{fraction}"
    if row.export is not None:
        text += f", NOT EXPORTED: {row.export}" if row.export else ", exported"
    return f"{text} ({spent})"


def _names(names: Sequence[str], every: bool) -> list[str]:
    if every == bool(names):
        raise InputError(
            "--all and names were both given." if names else "no model was named.",
            expected="either names, e.g. treeify verify resnet18, or --all",
        )
    if every:
        return library_names()
    check_names(names)
    return list(dict.fromkeys(name.removeprefix(TIMM) for name in names))


def _check_plain(output: Path) -> None:
    if output.suffix == ".xz":
        raise InputError(
            f"--output {output} is compressed; rows are appended to plain text.",
            expected="a name such as coverage.jsonl",
        )
