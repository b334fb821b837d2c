"""`treeify eval`: the accuracy of a trained ensemble on held-out images."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer
from rich.console import Console
from torch import Tensor, nn

from treeify import files
from treeify.cli.classes import (
    check_confusion,
    check_size,
    class_rows,
    class_table,
    confusion_text,
)
from treeify.cli.options import Device, Json, Trust, Weights
from treeify.cli.output import print_json, say, write_text
from treeify.cli.scores import as_csv, base_row, rows_of, score_rows, score_tables
from treeify.conversion import checkpoint
from treeify.conversion.ensemble import HierarchicalEnsemble
from treeify.data import Data
from treeify.deploy.exported import ExportedEnsemble
from treeify.deploy.exported_scores import exported_scores, exported_seconds
from treeify.deploy.saved import (
    base_model_in,
    checkpoint_in,
    data_for_export,
    data_section,
    exported_in,
    held_out_data,
    skips_damaged,
)
from treeify.engine import timing
from treeify.errors import InputError
from treeify.evaluation.classes import NamedClasses
from treeify.evaluation.comparison import compare, is_leaf, verdict
from treeify.evaluation.cost import Cost, answer_seconds
from treeify.evaluation.metrics import placed
from treeify.models.hub import local_path
from treeify.training.distributed import resolve_device
from treeify.training.loaders import Batch, held_out_loader, noting
from treeify.training.model import check_classes
from treeify.training.recipe import DataRecipe


def evaluate(
    directory: Annotated[
        Path,
        typer.Argument(
            metavar="DIRECTORY",
            parser=local_path,
            help="Run directory (its last checkpoint is taken), or a checkpoint such as "
            "runs/NAME/best; also as hf-hub:org/name@revision.",
        ),
    ],
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE",
            help="Key of the recipe's data section to set; may be repeated. With like=NAME, images "
            "are prepared as that model's.",
        ),
    ] = None,
    weights: Weights = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per batch.")] = 128,
    workers: Annotated[int, typer.Option(min=0, help="Processes that prepare images.")] = 0,
    trust: Trust = False,
    device: Device = "auto",
    latency: Annotated[
        bool,
        typer.Option("--latency/--no-latency", help="Time answers for one image, about 3 seconds."),
    ] = True,
    per_class: Annotated[
        bool, typer.Option("--per-class", help="Also show every size's accuracy on each class.")
    ] = False,
    confusion: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Also write how many images of each class are named each class: to a name that"
            " ends in .csv or .json.",
        ),
    ] = None,
    confusion_leaves: Annotated[
        int | None,
        typer.Option(min=1, help="With --confusion: the nested size it is of, else all leaves."),
    ] = None,
    csv: Annotated[Path | None, typer.Option(help="Also write the numbers to this file.")] = None,
    as_json: Json = False,
) -> None:
    """Measure a trained ensemble on held-out images, for every nested size.

    The base model comes first, then what every nested size gains over one leaf, and whether that is
    worth its cost: accuracy beside MACs, parameters and the time an answer takes here; negative
    log-likelihood, calibration error and how much the leaves differ; every leaf's own accuracy.
    An exported ensemble is measured by its own runtime, without a base model.

    For example:

        treeify eval runs/digits_hne

        treeify eval runs/digits_hne/best --json

        treeify eval my_ensemble --data name=image_folder --data root=photos --csv scores.csv

        treeify eval runs/digits_hne --per-class --confusion confusion.csv

        treeify eval runs/my_run --weights my_model.pth
    """
    exported = exported_in(directory, device)
    if exported is not None:
        _check_no_weights(weights, directory)
    path = checkpoint_in(directory, trust=trust) if exported is None else directory
    if csv is not None:
        files.check_writable_file(csv, f"--csv {csv}")
    check_confusion(confusion, confusion_leaves, csv)
    section = data_section(path, data or (), trust=trust)
    options = _Options(section, data or (), batch_size, workers, latency, confusion_leaves)
    if exported is None:
        found = _of_checkpoint(path, options, weights, device, trust=trust)
    else:
        found = _of_export(exported, options)
    if csv is not None:
        write_text(csv, as_csv(found.rows, found.single, found.base), "--csv")
    if confusion is not None:
        origin = {"ensemble": str(path), "split": found.data.split}
        text = confusion_text(
            confusion, found.classes, found.data.classes, confusion_leaves, origin
        )
        write_text(confusion, text, "--confusion")
    sizes = [row["leaves"] for row in found.rows]
    classes = class_rows(found.classes, found.data.classes, sizes) if per_class else None
    if as_json:
        base = None if found.base is None else {**found.base, "leaves": None}
        report = {
            "ensemble": path,
            "split": found.data.split,
            "skipped": sorted(found.skipped),
            "base": base and {**base, "weights": found.weights},
            "scores": found.rows,
            "leaf_accuracy": found.single,
            "per_class": classes,
            "verdict": found.verdict,
            "notes": found.notes,
            "machine": found.machine,
        }
        print_json(report)
    console = Console(quiet=as_json)
    _show(console, path, found, classes)
    if confusion is not None:
        size = "all" if confusion_leaves is None else confusion_leaves
        say(console, f"Confusion by {size} of the leaves is in {confusion}")


def _check_no_weights(weights: Path | None, directory: Path) -> None:
    if weights is not None:
        raise InputError(
            f"--weights was given, and {directory} is an export, which has no base model.",
            expected="--weights with the run or the ensemble that was exported",
        )


class _Options(NamedTuple):
    """What is measured on which images."""

    section: DataRecipe
    data: Sequence[str]
    batch_size: int
    workers: int
    latency: bool
    confusion_leaves: int | None

    def batches(self, data: Data, skipped: set[str], *, skip: bool) -> Iterator[Batch]:
        """Its held-out images; those that could not be read are added to a set."""
        batches = held_out_loader(data.held_out, self.batch_size, workers=self.workers, skip=skip)
        return noting(batches, skipped)


class _Found(NamedTuple):
    """What was measured: rows of `score_rows`, with the base model's where there is one."""

    data: Data
    rows: list[dict[str, Any]]
    single: Sequence[float]
    classes: NamedClasses
    verdict: str | None
    notes: list[str]
    skipped: set[str]
    machine: str | None
    base: dict[str, Any] | None = None
    weights: Path | None = None
    has_names: bool = True


def _show(
    console: Console, path: Path, found: _Found, classes: Sequence[dict[str, Any]] | None
) -> None:
    accuracies = ", ".join(f"{accuracy:.2f}" for accuracy in found.single)
    rows = found.rows if found.base is None else [found.base, *found.rows]
    say(console, *score_tables(rows), f"Each leaf by itself, %: {accuracies}")
    if classes is not None:
        say(console, class_table(classes))
    verdict = [] if found.verdict is None else [found.verdict]
    say(console, *verdict, *found.notes, f"{path}; {found.data.split}.")
    if found.data.preparation is not None:
        say(console, f"Images: {found.data.preparation}.")
    if not found.has_names:
        say(console, "Classes go by their numbers: the ensemble does not know their names.")
    if found.skipped:
        skipped = ", ".join(sorted(found.skipped))
        say(console, f"Not read, and left out: {skipped}", style="yellow")
    if found.machine is not None:
        say(console, f"ms: one image, {found.machine}.")


def _of_checkpoint(
    path: Path, options: _Options, weights: Path | None, device: str, *, trust: bool
) -> _Found:
    hne = checkpoint.load(path, trust=trust).to(resolve_device(device)).eval()
    check_size(options.confusion_leaves, hne.tree.nested_sizes)
    base, weights, unfit = base_model_in(hne, weights, path, trust=trust)
    data = held_out_data(path, options.section, options.data, hne.example[0], trust=trust)
    check_classes(hne, data)
    skipped: set[str] = set()
    batches = options.batches(data, skipped, skip=skips_damaged(path, trust=trust))
    measured = base if weights is not None else None
    classes = NamedClasses(hne.tree, len(data.classes))
    scores, gains, base_score = compare(hne, batches, measured, observe=classes.add_batch)
    x = placed(data.example()[None], hne)
    machine = timing.describe(x.device) if options.latency else None
    seconds = answer_seconds(hne, x, base=base) if options.latency else None
    differences = gains.result()
    rows = score_rows(hne, scores.result(), seconds=seconds, x=x, gains=differences)
    cost = rows[-1]["macs"] / rows[0]["macs"] if rows[0]["macs"] else 1.0
    return _Found(
        data,
        rows,
        scores.leaf_accuracy(),
        classes,
        verdict(differences[-1], cost, 100 - rows[0]["accuracy"], gains.images),
        [*unfit, *_base_notes(base, hne, weights), *_size_notes(hne, x)],
        skipped,
        machine,
        base_row(hne, rows[0]["macs"], base_score, seconds),
        weights,
        hne.preparation is not None and hne.preparation.classes is not None,
    )


def _of_export(exported: ExportedEnsemble, options: _Options) -> _Found:
    """The same of an export, for the sizes at which its steps end."""
    check_size(options.confusion_leaves, exported.sizes)
    data = data_for_export(exported, options.section, options.data)
    skipped: set[str] = set()
    batches = options.batches(data, skipped, skip=False)
    classes = NamedClasses(exported.tree, len(data.classes))
    # Two pools of threads that spin in one process, the export's and PyTorch's, slow each other.
    with timing.threads(1):
        scores, gains = exported_scores(exported, batches, data.classes, observe=classes.add_batch)
        x = data.example()[None]
        seconds = exported_seconds(exported, x) if options.latency else None
    kept = [scores.tree.nested_sizes.index(size) for size in exported.sizes]
    costs = [
        Cost(size, exported.count_macs(size), exported.count_parameters(size))
        for size in exported.sizes
    ]
    results, differences = scores.result(), gains.result()
    rows = rows_of(
        [results[index] for index in kept],
        costs,
        seconds=seconds,
        gains=[differences[index] for index in kept],
    )
    worth = None
    if exported.sizes[0] == 1:
        cost = rows[-1]["macs"] / rows[0]["macs"] if rows[0]["macs"] else 1.0
        worth = verdict(differences[-1], cost, 100 - rows[0]["accuracy"], gains.images)
    else:  # what one leaf costs is not known
        rows = [{**row, "gain_per_cost": None} for row in rows]
    return _Found(
        data,
        rows,
        scores.leaf_accuracy(),
        classes,
        worth,
        ["An export: its runtime answered, without PyTorch."],
        skipped,
        exported.machine if options.latency else None,
        has_names=exported.classes is not None,
    )


def _base_notes(base: nn.Module, hne: HierarchicalEnsemble, weights: Path | None) -> Iterator[str]:
    """Which weights the base model has."""
    if weights is None:
        yield "The base model's accuracy is not known: --weights PATH measures it."
    elif is_leaf(base, hne):
        yield f"Leaf 0 is the base model: it has the weights in {weights}."


def _size_notes(hne: HierarchicalEnsemble, x: Tensor) -> Iterator[str]:
    if tuple(x.shape[1:]) != hne.example:
        sizes = (" x ".join(map(str, shape)) for shape in (x.shape[1:], hne.example))
        yield "Images of {}; the ensemble was converted for {}.".format(*sizes)
