"""`treeify calibrate`: how fast an ensemble answers here, and when images need no more leaves."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from treeify.anytime.confidence import BUDGET, Budget
from treeify.anytime.deadline import LATENCIES, Latencies
from treeify.cli.options import Device, Json, SavedEnsemble, count
from treeify.cli.output import Column, print_json, say, table
from treeify.cli.saved import checkpoint_in, data_section, held_out_data, skips_damaged
from treeify.conversion import checkpoint
from treeify.conversion.ensemble import HierarchicalEnsemble
from treeify.data import Data
from treeify.engine.plan import TUNING, Tuning
from treeify.errors import CheckpointError, DataError, InputError
from treeify.evaluation.halves import Halves
from treeify.training.distributed import resolve_device
from treeify.training.loaders import held_out_loader, noting
from treeify.training.model import check_classes
from treeify.training.recipe import DataRecipe

_IMAGES_AT_ONCE = 128


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
        images = None
        if section is not None:
            images = held_out_data(path, section, data or (), hne.example[0])
    report: dict[str, Any] = {"ensemble": path}
    tables: list[str | Table] = []
    if images is not None:
        _check_images(hne, images)
        skipped: set[str] = set()
        batches = held_out_loader(images.held_out, _IMAGES_AT_ONCE, skip=skips_damaged(path))
        with console.status("answering the held-out images"):
            halves = Halves(hne, noting(batches, skipped), seed)
        budgets = [halves.budget(target) for target in targets]
        hne.budgets |= dict(zip(targets, budgets, strict=True))
        report |= _thresholds_report(halves, budgets, images.split, skipped)
        tables = [_accuracy_table(halves, budgets), _threshold_table(budgets)]
        tables.append(_explanation(halves, images.split, skipped))
    x = hne.example_images(batch_size)
    if tune:
        with console.status("tuning"):
            tuning = hne.tune(x)
        say(console, _tuning_table(tuning))
        report["tuning"] = TUNING.dump_python(tuning, mode="json", by_alias=True)
    with console.status("measuring latencies"):
        latencies = hne.calibrate(x, repeats=repeats)
    report["latencies"] = LATENCIES.dump_python(latencies, mode="json", by_alias=True)
    medians = f"{latencies.situation}: medians of {latencies.repeats} rounds"
    say(console, _latency_table(hne, latencies))
    say(console, f"{medians}; deadlines are kept with {latencies.margin_range()}.", *tables)
    checkpoint.save_measurements(hne, path)
    say(console, f"Saved in {path}")
    if as_json:
        print_json(report)


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
    rows = [
        (name + (" *" if name == str(tuning.plan) else ""), 1e3 * seconds)
        for name, seconds in sorted(tuning.seconds.items(), key=lambda row: row[1])
    ]
    columns = [Column("levels run", fold=True), Column("ms", ".2f")]
    return table(columns, rows, caption=f"{tuning.situation}; * chosen")


def _latency_table(hne: HierarchicalEnsemble, latencies: Latencies) -> Table:
    headings, *rows = latencies.rows()
    macs = ["MACs", *(hne.count_macs(size) for size in latencies.sizes)]
    caption = "ms from some leaves straight to more, and the 99th percentile"
    return table([Column(heading, ",d") for heading in headings], rows, [macs], caption=caption)


def _accuracy_table(halves: Halves, budgets: Sequence[Budget]) -> Table:
    """Fixed sizes, and beside them thresholds."""
    fixed = [
        (f"{size} {'leaf' if size == 1 else 'leaves'}, every image", macs, 100 * accuracy)
        for size, macs, accuracy in zip(halves.sizes, halves.macs, halves.fixed, strict=True)
    ]
    by_budget = [
        (f"budget {budget.target_macs:,}", budget.macs, 100 * budget.accuracy) for budget in budgets
    ]
    columns = [Column("answer"), Column("MACs", ",.0f"), Column("accuracy %", ".2f")]
    caption = "mean MACs per image, on images that no threshold was chosen on"
    return table(columns, fixed, by_budget, caption=caption)


def _threshold_table(budgets: Sequence[Budget]) -> Table:
    """The confidence that stops an image at each size, and how many it stops."""
    columns = [Column("leaves", "d")]
    columns += [Column(f"budget {budget.target_macs:,}", "") for budget in budgets]
    rows = [
        (size, *(_stop(budget, index) for budget in budgets))
        for index, size in enumerate(budgets[0].sizes)
    ]
    caption = "an image stops at this confidence: fraction of the images that do"
    return table(columns, rows, caption=caption)


def _stop(budget: Budget, index: int) -> str:
    fraction = f"{100 * budget.fractions[index]:.1f} %"
    if index == len(budget.thresholds):
        return f"the rest: {fraction}"
    threshold = budget.thresholds[index]
    return f"never: {fraction}" if threshold > 1 else f"{threshold:.4f}: {fraction}"


def _explanation(halves: Halves, split: str, skipped: set[str]) -> str:
    """On which images what was done."""
    chosen, reported = halves.images
    left_out = ", ".join(sorted(skipped))
    return (
        f"Thresholds were chosen on {chosen:,} held-out images; accuracy, MACs and stops are"
        f" those of the {reported:,} others (seed {halves.seed}; {split})."
        + (f" Not read, and left out: {left_out}." if left_out else "")
    )


def _thresholds_report(
    halves: Halves, budgets: Sequence[Budget], split: str, skipped: set[str]
) -> dict[str, Any]:
    """Everything the tables of accuracy and thresholds show; accuracies from 0 to 1."""
    chosen, reported = halves.images
    rows = zip(halves.sizes, halves.macs, halves.fixed, strict=True)
    return {
        "split": split,
        "seed": halves.seed,
        "skipped": sorted(skipped),
        "images": {"chosen_on": chosen, "reported_on": reported},
        "fixed": [dict(zip(("leaves", "macs", "accuracy"), row, strict=True)) for row in rows],
        "budgets": [BUDGET.dump_python(budget, mode="json", by_alias=True) for budget in budgets],
    }
