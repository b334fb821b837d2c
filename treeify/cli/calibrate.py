"""`treeify calibrate`: how fast an ensemble answers here, and when images need no more leaves."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from treeify.anytime.deadline import Latencies
from treeify.cli.options import Device, Json, SavedEnsemble, count
from treeify.cli.saved import checkpoint_in, data_section, skips_damaged
from treeify.evaluation.halves import Halves
from treeify.conversion import checkpoint
from treeify.conversion.ensemble import HierarchicalEnsemble
from treeify.data import Data
from treeify.engine.plan import TUNING, Tuning
from treeify.errors import CheckpointError, DataError, InputError
from treeify.training.distributed import resolve_device
from treeify.training.recipe import DataRecipe
from treeify.training.trainer import check_classes


def calibrate(
    directory: SavedEnsemble,
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE",
            help="Key of a recipe's data section to set, for --target-macs; may be repeated. A run "
            "directory knows its data. With like=NAME, images are prepared as that model's.",
        ),
    ] = None,
    target_macs: Annotated[
        list[int] | None,
        count(
            "--target-macs",
            "Mean MACs per image to choose confidence thresholds for, such as 60M or 1.2G; may be"
            " repeated.",
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per call to measure.")] = 1,
    tune: Annotated[
        bool, typer.Option("--tune/--no-tune", help="First choose the fastest way to run.")
    ] = True,
    repeats: Annotated[int, typer.Option(min=10, help="Rounds to measure.")] = 50,
    seed: Annotated[int, typer.Option(min=0, help="Of the held-out images' halves.")] = 0,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Measure how fast an ensemble answers here, and choose when images need no more leaves.

    What is found is saved with the ensemble, all at the end: `treeify predict` goes by the
    latencies to keep a `--deadline`, and by the thresholds to keep a `--budget`. Thresholds are
    chosen on one half of the held-out images; accuracy is reported on the other.

    For example:

        treeify calibrate my_ensemble

        treeify calibrate runs/digits_hne --target-macs 150k --target-macs 300k

        treeify calibrate my_ensemble --target-macs 1.2G --data name=image_folder --data root=photos
    """
    targets = target_macs or []
    path = checkpoint_in(directory)
    section = _section(path, data or (), targets)
    _check_writable(path)
    console = Console(quiet=as_json)
    with console.status("loading"):
        hne = checkpoint.load(path).to(resolve_device(device))
        _check_targets(hne, targets)
        images = None if section is None else section.load()
    found: dict[str, Any] = {"ensemble": str(path)}
    if images is not None:
        _check_images(hne, images)
        with console.status("answering the held-out images"):
            halves = Halves(hne, images, seed, skip=skips_damaged(path))
        budgets = [halves.budget(target) for target in targets]
        hne.budgets |= dict(zip(targets, budgets, strict=True))
        found |= halves.as_json(budgets)
    x = hne.example_images(batch_size)
    if tune:
        with console.status("tuning"):
            tuning = hne.tune(x)
        console.print(_tuning_table(tuning))
        found["tuning"] = TUNING.dump_python(tuning, mode="json", by_alias=True)
    with console.status("measuring latencies"):
        latencies = hne.calibrate(x, repeats=repeats)
    console.print(_latency_table(hne, latencies))
    line = (
        f"{latencies.situation}: medians of {latencies.repeats} rounds; deadlines are kept with"
        f" {latencies.margin_range()}."
    )
    console.print(line, soft_wrap=True, highlight=False)
    found["latencies"] = LATENCIES.dump_python(latencies, mode="json", by_alias=True)
    if images is not None:
        console.print(halves.accuracy_table(budgets))
        console.print(halves.threshold_table(budgets))
        console.print(halves.explanation(), soft_wrap=True, highlight=False, markup=False)
    checkpoint.save_measurements(hne, path)
    console.print(f"Saved in {path}", soft_wrap=True, highlight=False, markup=False)
    if as_json:
        typer.echo(json.dumps(found, indent=2))


def _section(path: Path, options: Sequence[str], targets: Sequence[int]) -> DataRecipe | None:
    if options and not targets:
        raise InputError(
            "--data was given, but nothing to choose on it.",
            expected="--target-macs with it, e.g. --target-macs 60M",
        )
    return data_section(path, options) if targets else None


def _check_writable(path: Path) -> None:
    if not os.access(path, os.W_OK):
        raise CheckpointError(
            f"{path} cannot be written: what is measured could not be kept.",
            next_step="Copy the ensemble to a directory of your own.",
        )


def _check_targets(hne: HierarchicalEnsemble, targets: Sequence[int]) -> None:
    least, most = hne.count_macs(1), hne.count_macs()
    if wrong := [target for target in targets if not least <= target <= most]:
        raise InputError(
            f"--target-macs {', '.join(f'{target:,}' for target in wrong)} cannot be kept.",
            expected=f"a mean from {least:,} (1 leaf) to {most:,} ({hne.leaves} leaves)",
        )


def _check_images(hne: HierarchicalEnsemble, images: Data) -> None:
    check_classes(hne, images)
    count = len(images.held_out)  # type: ignore[arg-type]
    if count < 2:
        raise DataError(
            f"{count} held-out image cannot be halved.", expected="at least 2, better hundreds"
        )
    if (shape := tuple(images.example().shape)) != hne.example:
        raise InputError(
            "the held-out images have another size than the ensemble was converted for, so other"
            " MACs.",
            expected=f"{hne.example}",
            found=f"{shape}",
            next_step="Set their size, e.g. --data size=..., or convert for that size.",
        )


def _tuning_table(tuning: Tuning) -> Table:
    table = Table(caption=f"{tuning.situation}; * chosen")
    table.add_column("levels run", overflow="fold")
    table.add_column("ms", justify="right")
    for name, seconds in sorted(tuning.seconds.items(), key=lambda row: row[1]):
        star = " *" if name == str(tuning.plan) else ""
        table.add_row(name + star, f"{1e3 * seconds:.2f}")
    return table


def _latency_table(hne: HierarchicalEnsemble, latencies: Latencies) -> Table:
    table = Table(caption="ms from some leaves straight to more, and the 99th percentile")
    head, *rows = latencies.rows()
    for heading in head:
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(*row)
    macs = (f"{hne.count_macs(size):,}" for size in latencies.sizes)
    table.add_section()
    table.add_row("MACs", *macs)
    return table
