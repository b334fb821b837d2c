"""`treeify predict`: image files in, answers that get better out."""

from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic.dataclasses import dataclass as serialised
from rich.console import Console
from rich.live import Live
from rich.table import Table

from treeify import files
from treeify.anytime.confidence import Budget
from treeify.cli import quantities
from treeify.cli.answers import Answers, ImageAnswers, as_csv
from treeify.cli.batches import Ensemble, Limits, Run
from treeify.cli.image_files import image_files
from treeify.cli.options import Device, Json, SavedEnsemble, Trust, count, duration, numbers, size
from treeify.cli.output import Column, print_json, say, table, table_width, write_text
from treeify.conversion import checkpoint
from treeify.deploy.exported import ExportedEnsemble
from treeify.deploy.saved import (
    checkpoint_in,
    exported_in,
    library_classes,
    preparation_in,
    preparation_of_export,
)
from treeify.engine import timing
from treeify.errors import DataError, InputError
from treeify.training.distributed import resolve_device

# Of class names, one a line.
_MOST_BYTES = 2**24


def predict(
    directory: SavedEnsemble,
    images: Annotated[
        list[str],
        typer.Argument(
            metavar="IMAGE...",
            help="Image files, folders (all images below them) or patterns such as 'photos/*.jpg'.",
        ),
    ],
    deadline: Annotated[
        float | None,
        duration(
            "--deadline",
            "Time for each batch, once its images are loaded: 20ms, 0.02s or 0.02 (seconds).",
        ),
    ] = None,
    confidence: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help="Stop adding leaves to an image once its likeliest class is this probable.",
        ),
    ] = None,
    leaves: Annotated[
        int | None, typer.Option(min=1, help="Leaves to stop at; by default all.")
    ] = None,
    budget: Annotated[
        int | None,
        count(
            "--budget",
            "Mean MACs per image, such as 60M, that treeify calibrate chose thresholds for.",
        ),
    ] = None,
    labels: Annotated[Path | None, typer.Option(help="Text file, one class name a line.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images to answer together.")] = 64,
    csv: Annotated[
        Path | None, typer.Option(help="Write a line for each image to this file, not tables.")
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="Classes to end with.")] = 5,
    mean: Annotated[
        Sequence[float] | None,
        numbers("--mean", "Of the channels, pixels in 0 to 1, if not what is known."),
    ] = None,
    std: Annotated[
        Sequence[float] | None, numbers("--std", "Their deviation; with --mean.", positive=True)
    ] = None,
    input_size: Annotated[
        quantities.Size | None,
        size("--input-size", "Height and width, 96 or 96x160, if not the ensemble's."),
    ] = None,
    trust: Trust = False,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Classify images, with answers that get better while there is time.

    Without a limit all leaves answer in the end. A deadline needs to know how long steps take for
    as many images on this machine: the first call measures it, and keeps it with the ensemble.
    Images are read batch by batch; of a folder or pattern, those that cannot be read are left out.

    For example:

        treeify predict runs/digits_hne digit.png

        treeify predict my_ensemble photos/ --csv answers.csv

        treeify predict my_ensemble photos/*.jpg --deadline 20ms

        treeify predict my_ensemble photo.jpg --confidence 0.9 --labels classes.txt --json
    """
    _check_single(leaves, deadline, confidence, budget)
    chosen = image_files(images)
    exported = exported_in(directory, device)
    path = checkpoint_in(directory, trust=trust) if exported is None else directory
    if csv is not None:
        files.check_writable_file(csv, f"--csv {csv}")
    console = Console(quiet=as_json)
    if exported is None:
        preparation = preparation_in(path, mean, std, input_size, trust=trust)
    else:
        preparation = preparation_of_export(exported, mean, std, input_size)
        batch_size = exported.images or batch_size
    preparation.check()
    notes = [f"Images: {preparation}."]
    if input_size is not None:
        notes.append("MACs are those of the size that the ensemble was converted for.")
    with console.status("loading"):
        names = preparation.classes if labels is None else _read_labels(labels)
        hne = exported or checkpoint.load(path, trust=trust).to(resolve_device(device))
    sufficient = confidence if budget is None else _saved_budget(hne, budget, path)
    limits = Limits(leaves, deadline, sufficient)
    label = partial(_labels, names, hne=hne, path=path, notes=notes)
    run = Run(hne, path, limits, label, top, notes)
    # Drawing would eat into a deadline, and cannot grow where nothing is redrawn.
    drawn = console.is_terminal and deadline is None and not as_json and len(chosen) <= batch_size
    view = Live(console=console, auto_refresh=False, transient=True) if drawn else None
    # Two pools of threads that spin in one process, the export's and PyTorch's, slow each other.
    with timing.threads(None if exported is None else 1):
        for start in range(0, len(chosen), batch_size):
            with console.status("reading"):
                run.read(chosen[start : start + batch_size], preparation)
            with console.status("warming up"):
                run.warm_up()
            with view or nullcontext():
                run.answer(partial(_redraw, view))
    answered = run.finish()
    report = Report(
        ensemble=str(path),
        device="cpu" if isinstance(hne, ExportedEnsemble) else str(next(hne.parameters()).device),
        input=preparation.shape,
        mean=preparation.mean or (),
        std=preparation.std or (),
        normalisation=preparation.source,
        leaves=leaves,
        confidence=confidence,
        budget=budget,
        deadline_ms=None if deadline is None else 1e3 * deadline,
        elapsed_ms=1e3 * max(run.seconds),
        deadline_met=None if deadline is None else all(run.met),
        batches=len(run.seconds),
        measured_latencies=run.measured,
        macs=sum(hne.count_macs(image.leaves) for image in answered) / len(answered),
        notes=notes,
        unread=run.unread,
        images=answered,
    )
    if csv is not None:
        write_text(csv, as_csv(answered), "--csv")
        notes.append(f"Written to {csv}: {len(answered):,} images.")
    if as_json:
        print_json(report)
    tables = [] if csv else [_answers_table(answered), _best_table(answered)]
    say(console, *tables, *notes, *_summary(report, run.met))


@serialised(frozen=True)
class Report:
    """What `--json` prints: how the images were prepared, what ended the answers, and these.

    Args:
        input: shape of an image, `(C, H, W)`.
        mean: of each channel.
        std: of each channel.
        normalisation: where mean and std come from.
        leaves: the limit asked for; else confidence, budget (mean MACs per image) or deadline is.
        elapsed_ms: from the call to its last answer, of the slowest batch.
        deadline_met: by every batch.
        batches: of images that were answered together.
        measured_latencies: whether they had to be measured first.
        macs: mean MACs per image of the leaves used.
        notes: what the user should know.
        unread: files of a folder or pattern that cannot be read.
    """

    ensemble: str
    device: str
    input: tuple[int, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    normalisation: str
    leaves: int | None
    confidence: float | None
    budget: int | None
    deadline_ms: float | None
    elapsed_ms: float
    deadline_met: bool | None
    batches: int
    measured_latencies: bool
    macs: float
    notes: list[str]
    unread: list[str]
    images: list[ImageAnswers]


def _check_single(
    leaves: int | None, deadline: float | None, confidence: float | None, budget: int | None
) -> None:
    options = {
        "--leaves": leaves,
        "--deadline": deadline,
        "--confidence": confidence,
        "--budget": budget,
    }
    limits = [option for option, value in options.items() if value is not None]
    if len(limits) > 1:
        raise InputError(f"{' and '.join(limits)} were given.", expected="one of them")


def _read_labels(file: Path) -> Sequence[str]:
    try:
        return files.read_bytes(file, _MOST_BYTES).decode("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"--labels {str(file)!r} cannot be read: {error}",
            expected="a UTF-8 text file, one class name a line",
        ) from error


def _labels(
    labels: Sequence[str] | None,
    classes: int,
    hne: Ensemble,
    path: Path,
    notes: list[str],
) -> Sequence[str] | None:
    """A name for every class, or None to go by their indices."""
    if labels is not None:
        if len(labels) != classes:
            raise DataError(
                "--labels do not fit the ensemble.",
                expected=f"{classes} lines, a class name each",
                found=f"{len(labels)}",
            )
        return labels
    if isinstance(hne, ExportedEnsemble):
        return None
    if (names := library_classes(hne, path, classes)) is not None:
        notes.append(
            "Labels: ImageNet-1k's, as the architecture has 1,000 classes (else --labels)."
        )
    return names


def _saved_budget(hne: Ensemble, target: int, path: Path) -> Budget:
    """The thresholds that were chosen for a number of MACs per image."""
    if target in hne.budgets:
        return hne.budgets[target]
    saved = ", ".join(f"{macs:,}" for macs in sorted(hne.budgets))
    choose = f"Choose them: treeify calibrate {path} --target-macs {target}"
    if isinstance(hne, ExportedEnsemble):
        choose = "Choose them with treeify calibrate --target-macs before treeify export."
    raise InputError(
        f"no thresholds are saved for a budget of {target:,} MACs per image.",
        expected=f"one of {saved}" if saved else "a budget that was calibrated",
        found=None if saved else "none, no budget has been calibrated",
        next_step=choose,
    )


def _redraw(view: Live | None, answers: Answers) -> None:
    if view is None:
        return
    shown = _answers_table(answers.of_images())
    if table_width(view.console, shown) <= view.console.width:  # else it could not be redrawn
        view.update(shown, refresh=True)


_IMAGE = Column("image")
_BEST = (Column("class"), Column("probability %", ".1f"))


def _answers_table(images: Sequence[ImageAnswers]) -> Table:
    """A row for every image and step so far."""
    columns = [Column("leaves", "d"), Column("ms", ".2f"), Column("MACs", ",d"), *_BEST]
    sections = [
        [
            (row.leaves, row.elapsed_ms, row.macs, row.name, 100 * row.probability)
            for row in image.answers
        ]
        for image in images
    ]
    return _table(images, columns, sections, "ms since the call; MACs per image")


def _best_table(images: Sequence[ImageAnswers]) -> Table:
    """The likeliest classes of every image."""
    sections = [
        [
            ("" if index else str(image.leaves), row.name, 100 * row.probability)
            for index, row in enumerate(image.top)
        ]
        for image in images
    ]
    return _table(images, [Column("leaves", "d"), *_BEST], sections, "by all leaves used")


def _table(
    images: Sequence[ImageAnswers],
    columns: Sequence[Column],
    sections: Sequence[Sequence[tuple[Any, ...]]],
    caption: str,
) -> Table:
    """A section for every image, after the names of the files where there are several."""
    if len(images) == 1:
        return table(columns, *sections, caption=caption)
    named = [
        [("" if index else image.path, *row) for index, row in enumerate(rows)]
        for image, rows in zip(images, sections, strict=True)
    ]
    return table([_IMAGE, *columns], *named, caption=caption)


def _summary(report: Report, met: Sequence[bool]) -> list[str]:
    """What became of the limit."""
    leaves = sum(image.leaves for image in report.images) / len(report.images)
    word = "leaf" if leaves == 1 else "leaves"
    mean = f"{leaves:.4g} {word} and {report.macs:,.0f} MACs per image"
    if report.deadline_ms is not None:
        end = f"answered after {report.elapsed_ms:.2f} ms with {mean}"
        verdict = "met" if report.deadline_met else "missed"
        if len(met) > 1:
            verdict = f"met by {sum(met)} of {len(met)} batches"
            end = f"the slowest {end}"
        return [f"Deadline of {report.deadline_ms:g} ms {verdict}: {end}."]
    if report.confidence is not None:
        return [f"Confidence {report.confidence:g}: {mean} on average."]
    if report.budget is not None:
        return [f"Budget of {report.budget:,} MACs: {mean} on average."]
    return []
