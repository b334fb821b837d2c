"""`treeify calibrate`: how fast an ensemble answers here, and when images need no more leaves."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from treeify.anytime.deadline import LATENCIES, Latencies
from treeify.cli.choice import Choice, Targets
from treeify.cli.options import Device, Json, SavedEnsemble, Trust, count
from treeify.cli.output import Column, print_json, say, table
from treeify.conversion import checkpoint
from treeify.conversion.ensemble import HierarchicalEnsemble
from treeify.data import Data
from treeify.deploy import runtime
from treeify.deploy.exported import ExportedEnsemble
from treeify.deploy.saved import (
    checkpoint_in,
    data_section,
    exported_in,
    held_out_data,
    keep_measurements,
    skips_damaged,
)
from treeify.engine import timing
from treeify.engine.plan import NOT_THE_FASTEST, TUNING, Tuning
from treeify.errors import CheckpointError, DataError, InputError
from treeify.evaluation.halves import Halves
from treeify.training.distributed import resolve_device
from treeify.training.loaders import held_out_loader, noting
from treeify.training.model import check_classes

_IMAGES_AT_ONCE = 128


def calibrate(
    directory: SavedEnsemble,
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE",
            help="Key of a recipe's data section to set, for targets and --sweep; may be repeated. "
            "A run directory knows its data. With like=NAME, images are prepared as that model's.",
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
    target_ms: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Mean milliseconds per image to find the most accurate way to answer for: a number"
            " of leaves or a budget, one image at a time.",
        ),
    ] = None,
    target_accuracy: Annotated[
        float | None,
        typer.Option(
            min=0, max=100, help="Accuracy in percent to find the cheapest way to answer for."
        ),
    ] = None,
    sweep: Annotated[
        bool,
        typer.Option("--sweep", help="Show, and keep thresholds for, a range of mean MACs."),
    ] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per call to measure.")] = 1,
    tune: Annotated[
        bool, typer.Option("--tune/--no-tune", help="First choose the fastest way to run.")
    ] = True,
    repeats: Annotated[int, typer.Option(min=10, help="Rounds to measure.")] = 50,
    seed: Annotated[int, typer.Option(min=0, help="Of the held-out images' halves.")] = 0,
    trust: Trust = False,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Measure how fast an ensemble answers here, and choose when images need no more leaves.

    What is found is saved with the ensemble, all at the end: `treeify predict` goes by the
    latencies to keep a `--deadline`, and by the thresholds to keep a `--budget`. Thresholds are
    chosen on one half of the held-out images; accuracy is reported on the other. Of an exported
    ensemble, latencies are measured and kept beside it.

    For example:

        treeify calibrate my_ensemble

        treeify calibrate runs/digits_hne --target-macs 150k --target-macs 300k

        treeify calibrate runs/digits_hne --sweep --target-ms 2 --target-accuracy 98

        treeify calibrate my_ensemble --target-macs 1.2G --data name=image_folder --data root=photos
    """
    targets = Targets(target_macs or [], target_ms, target_accuracy, sweep)
    targets.check(data or (), batch_size)
    if (exported := exported_in(directory, device)) is not None:
        _check_no_targets(targets, directory)
        _check_writable(directory)
        _calibrate_export(exported, batch_size, repeats, as_json=as_json)
        return
    path = checkpoint_in(directory, trust=trust)
    section = data_section(path, data or (), trust=trust) if targets else None
    _check_writable(path)
    console = Console(quiet=as_json)
    with console.status("loading"):
        hne = checkpoint.load(path, trust=trust).to(resolve_device(device))
        _check_macs(hne, targets.macs)
        images = None
        if section is not None:
            images = held_out_data(path, section, data or (), hne.example[0], trust=trust)
    choice, skipped = None, set[str]()
    if images is not None:
        _check_images(hne, images)
        batches = held_out_loader(
            images.held_out, _IMAGES_AT_ONCE, skip=skips_damaged(path, trust=trust)
        )
        with console.status("answering the held-out images"):
            halves = Halves(hne, noting(batches, skipped), seed)
        choice = Choice(halves, targets)
    report: dict[str, Any] = {"ensemble": path}
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
    say(console, f"{medians}; deadlines are kept with {latencies.margin_range()}.")
    if choice is not None and images is not None:
        choice.finish(latencies if batch_size == 1 else None)
        hne.budgets |= choice.budgets
        report |= choice.report(images.split, skipped)
        say(console, *choice.tables(), choice.explanation(images.split, skipped))
        say(console, *choice.advice(path))
    try:
        report["ensemble"] = keep_measurements(hne, path, directory, trust=trust)
    finally:  # what took so long is not lost altogether
        if as_json:
            print_json(report)
    say(console, f"Saved in {report['ensemble']}")


def _check_no_targets(targets: Targets, directory: Path) -> None:
    if targets:
        raise InputError(
            f"thresholds cannot be chosen for {directory}, which is an export: its files say how"
            " images are answered for each budget.",
            expected="what it was exported from, for --target-macs, --target-ms, --target-accuracy"
            " and --sweep",
            next_step="Choose them there with treeify calibrate, and export again: budgets go with"
            " it.",
        )


def _calibrate_export(
    exported: ExportedEnsemble, batch_size: int, repeats: int, *, as_json: bool
) -> None:
    """Measure how long an export's steps take, and keep it beside them."""
    console = Console(quiet=as_json)
    x = exported.example_images(batch_size)
    # Two pools of threads that spin in one process, the export's and PyTorch's, slow each other.
    with console.status("measuring latencies"), timing.threads(1):
        latencies, kept = exported.calibrate(x, repeats=repeats)
    margins = latencies.margins
    rows = [
        {
            "from": start,
            "to": stop,
            "typical": seconds,
            "slow": latencies.slow[start, stop],
            "margin": margins[start, stop],
        }
        for (start, stop), seconds in latencies.typical.items()
    ]
    say(
        console,
        _latency_table(exported, latencies),
        f"{latencies.situation}: medians of {latencies.repeats} rounds; deadlines are kept with"
        f" margins {min(margins.values()):.2f} to {max(margins.values()):.2f}.",
        f"{kept[0].upper()}{kept[1:]}",
    )
    if as_json:
        measured = {
            "situation": latencies.situation,
            "sizes": latencies.sizes,
            "transitions": rows,
            "repeats": latencies.repeats,
        }
        print_json({"ensemble": exported.path, "latencies": measured})


def _check_writable(path: Path) -> None:
    if not os.access(path, os.W_OK):
        raise CheckpointError(
            f"{path} cannot be written: what is measured could not be kept.",
            next_step="Copy the ensemble to a directory of your own.",
        )


def _check_macs(hne: HierarchicalEnsemble, targets: Sequence[int]) -> None:
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
    ranked = sorted(tuning.seconds.items(), key=lambda row: row[1])
    rows = [
        (name + (" *" if name == str(tuning.plan) else ""), 1e3 * seconds)
        for name, seconds in ranked
    ]
    columns = [Column("levels run"), Column("ms", ".2f")]
    caption = f"{tuning.situation}; * chosen"
    if ranked[0][0] != str(tuning.plan):
        caption += f". {NOT_THE_FASTEST}"
    return table(columns, rows, caption=caption)


def _latency_table(
    hne: HierarchicalEnsemble | ExportedEnsemble, latencies: Latencies | runtime.Latencies
) -> Table:
    headings, *rows = latencies.rows()
    macs = ["MACs", *(hne.count_macs(size) for size in latencies.sizes)]
    caption = "ms from some leaves straight to more, and the 99th percentile"
    return table([Column(heading, ",d") for heading in headings], rows, [macs], caption=caption)
