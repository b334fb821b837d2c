"""`treeify eval`: the accuracy of a trained ensemble on held-out images."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from treeify import files
from treeify.cli.options import Device, Json
from treeify.cli.output import print_json, say
from treeify.cli.saved import checkpoint_in, data_section, held_out_data, skips_damaged
from treeify.cli.scores import as_csv, score_rows, score_table
from treeify.conversion import checkpoint
from treeify.engine import timing
from treeify.errors import DataError
from treeify.evaluation.cost import answer_seconds
from treeify.evaluation.metrics import measure
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
    batch_size: Annotated[int, typer.Option(min=1, help="Images per batch.")] = 128,
    workers: Annotated[int, typer.Option(min=0, help="Processes that prepare images.")] = 0,
    device: Device = "auto",
    latency: Annotated[
        bool,
        typer.Option("--latency/--no-latency", help="Time answers for one image, about 3 seconds."),
    ] = True,
    csv: Annotated[Path | None, typer.Option(help="Also write the numbers to this file.")] = None,
    as_json: Json = False,
) -> None:
    """Measure a trained ensemble on held-out images, for every nested size.

    Accuracy, negative log-likelihood, calibration error and how much the leaves' logits differ,
    beside MACs, parameters and the time an answer takes here; and every single leaf's accuracy.

    For example:

        treeify eval runs/digits_hne

        treeify eval runs/digits_hne/best --json

        treeify eval my_ensemble --data name=image_folder --data root=photos --csv scores.csv
    """
    path = checkpoint_in(directory)
    section = data_section(path, data or ())
    hne = checkpoint.load(path).to(resolve_device(device))
    images = held_out_data(path, section, data or (), hne.example[0])
    check_classes(hne, images)
    skip = skips_damaged(path)
    batches = held_out_loader(images.held_out, batch_size, workers=workers, skip=skip)
    skipped: set[str] = set()
    scores = measure(hne, noting(batches, skipped))
    parameter = next(hne.parameters())
    x = images.example()[None].to(parameter.device, parameter.dtype)
    machine = timing.describe(x.device) if latency else None
    seconds = answer_seconds(hne.eval(), x) if latency else None
    rows, single = score_rows(hne, scores.result(), seconds=seconds, x=x), scores.leaf_accuracy()
    if csv is not None:
        _write(csv, as_csv(rows, single))
    if as_json:
        report = {
            "ensemble": path,
            "split": images.split,
            "skipped": sorted(skipped),
            "scores": rows,
            "leaf_accuracy": single,
            "machine": machine,
        }
        print_json(report)
    accuracies = ", ".join(f"{accuracy:.2f}" for accuracy in single)
    console = Console(quiet=as_json)
    say(console, score_table(rows), f"Each leaf by itself, %: {accuracies}")
    say(console, f"{path}; {images.split}.")
    if images.preparation is not None:
        say(console, f"Images: {images.preparation}.")
    if hne.preparation is None or hne.preparation.classes is None:
        say(console, "Classes go by their numbers: the ensemble does not know their names.")
    if skipped:
        say(console, f"Not read, and left out: {', '.join(sorted(skipped))}", style="yellow")
    if machine is not None:
        say(console, f"ms: one image, {machine}.")


def _write(path: Path, text: str) -> None:
    try:
        files.replace_text(path, text)
    except OSError as error:
        raise DataError(
            f"{path} cannot be written: {error}", next_step="Give another --csv."
        ) from error
