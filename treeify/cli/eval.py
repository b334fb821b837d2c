"""`treeify eval`: the accuracy of a trained ensemble on held-out images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from treeify import checkpoint
from treeify.batches import held_out_loader
from treeify.cli.saved import checkpoint_in, data_section
from treeify.cli.scores import score_rows, score_table
from treeify.metrics import measure
from treeify.trainer import check_classes, resolve_device


def evaluate(
    directory: Annotated[
        Path,
        typer.Argument(
            help="Run directory (its last checkpoint is taken), or a checkpoint such as "
            "runs/NAME/best.",
            show_default=False,
        ),
    ],
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE",
            help="Key of the recipe's data section to set; may be repeated.",
            show_default=False,
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per batch.")] = 128,
    workers: Annotated[int, typer.Option(min=0, help="Processes that prepare images.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead.")] = False,
) -> None:
    """Measure a trained ensemble on held-out images, for every nested size.

    For example:

        treeify eval runs/digits_hne

        treeify eval runs/digits_hne/best --json

        treeify eval my_ensemble --data name=image_folder --data root=photos
    """
    path = checkpoint_in(directory)
    section = data_section(path, data or ())
    hne = checkpoint.load(path).to(resolve_device(device))
    images = section.load()
    check_classes(hne, images)
    batches = held_out_loader(images.held_out, batch_size, workers=workers)
    scores = measure(hne, batches).result()
    if as_json:
        found = {"ensemble": str(path), "split": images.split, "scores": score_rows(hne, scores)}
        typer.echo(json.dumps(found, indent=2))
        return
    console = Console()
    console.print(score_table(hne, scores))
    console.print(f"{path}; {images.split}.", soft_wrap=True, highlight=False)
