"""`treeify eval`: the accuracy of a trained ensemble on held-out images."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from torch import Tensor, nn

from treeify import files
from treeify.cli.options import Device, Json, Trust, Weights
from treeify.cli.output import check_file, print_json, say, write_text
from treeify.cli.saved import (
    checkpoint_in,
    data_section,
    held_out_data,
    origin_of,
    skips_damaged,
)
from treeify.cli.scores import as_csv, base_row, score_rows, score_tables
from treeify.conversion import checkpoint
from treeify.conversion.ensemble import HierarchicalEnsemble
from treeify.engine import timing
from treeify.errors import CheckpointError
from treeify.evaluation.comparison import base_model_of, compare, is_leaf, verdict
from treeify.evaluation.cost import answer_seconds
from treeify.evaluation.metrics import placed
from treeify.training.distributed import resolve_device
from treeify.training.loaders import held_out_loader, noting
from treeify.training.model import check_classes


def evaluate(
    directory: Annotated[
        Path,
        typer.Argument(
            help="Run directory (its last checkpoint is taken), or a checkpoint such as "
            "runs/NAME/best."
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
    csv: Annotated[Path | None, typer.Option(help="Also write the numbers to this file.")] = None,
    as_json: Json = False,
) -> None:
    """Measure a trained ensemble on held-out images, for every nested size.

    The base model comes first, then what every nested size gains over one leaf, and whether that is
    worth its cost: accuracy beside MACs, parameters and the time an answer takes here; negative
    log-likelihood, calibration error and how much the leaves differ; every leaf's own accuracy.

    For example:

        treeify eval runs/digits_hne

        treeify eval runs/digits_hne/best --json

        treeify eval my_ensemble --data name=image_folder --data root=photos --csv scores.csv

        treeify eval runs/my_run --weights my_model.pth
    """
    path = checkpoint_in(directory, trust=trust)
    if csv is not None:
        check_file(csv, "--csv")
    section = data_section(path, data or (), trust=trust)
    hne = checkpoint.load(path, trust=trust).to(resolve_device(device)).eval()
    base, weights, unfit = _base_model(hne, weights, path, trust=trust)
    images = held_out_data(path, section, data or (), hne.example[0], trust=trust)
    check_classes(hne, images)
    skip = skips_damaged(path, trust=trust)
    batches = held_out_loader(images.held_out, batch_size, workers=workers, skip=skip)
    skipped: set[str] = set()
    measured = base if weights is not None else None
    scores, gains, base_score = compare(hne, noting(batches, skipped), measured)
    x = placed(images.example()[None], hne)
    machine = timing.describe(x.device) if latency else None
    seconds = answer_seconds(hne, x, base=base) if latency else None
    differences = gains.result()
    rows = score_rows(hne, scores.result(), seconds=seconds, x=x, gains=differences)
    single = scores.leaf_accuracy()
    first = base_row(hne, rows[0]["macs"], base_score, seconds)
    cost = rows[-1]["macs"] / rows[0]["macs"] if rows[0]["macs"] else 1.0
    worth = verdict(differences[-1], cost, 100 - rows[0]["accuracy"], gains.images)
    if csv is not None:
        write_text(csv, as_csv(rows, single, first), "--csv")
    notes = [*unfit, *_base_notes(base, hne, weights), *_size_notes(hne, x)]
    if as_json:
        report = {
            "ensemble": path,
            "split": images.split,
            "skipped": sorted(skipped),
            "base": {**first, "leaves": None, "weights": weights},
            "scores": rows,
            "leaf_accuracy": single,
            "verdict": worth,
            "notes": notes,
            "machine": machine,
        }
        print_json(report)
    accuracies = ", ".join(f"{accuracy:.2f}" for accuracy in single)
    console = Console(quiet=as_json)
    say(console, *score_tables([first, *rows]), f"Each leaf by itself, %: {accuracies}")
    say(console, *([worth] if worth else []), *notes, f"{path}; {images.split}.")
    if images.preparation is not None:
        say(console, f"Images: {images.preparation}.")
    if hne.preparation is None or hne.preparation.classes is None:
        say(console, "Classes go by their numbers: the ensemble does not know their names.")
    if skipped:
        say(console, f"Not read, and left out: {', '.join(sorted(skipped))}", style="yellow")
    if machine is not None:
        say(console, f"ms: one image, {machine}.")


def _base_model(
    hne: HierarchicalEnsemble, weights: Path | None, path: Path, *, trust: bool
) -> tuple[nn.Module, Path | None, list[str]]:
    """The base model, where its weights are from if that is known, and why those do not fit."""
    origin = origin_of(path, trust=trust) if weights is None else None
    if origin is not None and not trust:  # it may be any file, in any format
        note = f"The run says it began with the weights in {origin}: --weights {origin} reads them."
        return base_model_of(hne, None), None, [note]
    if origin is not None and (files.is_file(origin) or files.is_directory(origin)):
        try:
            return base_model_of(hne, origin, trust=True), origin, []
        except CheckpointError:  # its head is for other classes, say
            note = f"The weights in {origin}, which the run began with, are of another model."
            return base_model_of(hne, None), None, [note]
    return base_model_of(hne, weights, trust=trust), weights, []


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
